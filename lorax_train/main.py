"""Trains: `python -m lorax_train.main --config FILE [--config.a.b=v ...]`."""

import sys
from collections.abc import Sequence

from absl import flags
from ml_collections import config_flags

from lorax_train import config, distributed, errors


def main(argv: Sequence[str]) -> int:
  """Parses the command line and trains; returns the exit code.

  The first line on stderr of a failed run says what, where and what to do.
  """
  if {'-h', '--help'} & set(argv[1:]):
    print('usage: --config FILE.py [--config.SECTION.KEY=VALUE ...]')
    print(distributed.USAGE)
    return 0
  try:
    options, rest = distributed.options_of(argv)
    cfg = parse(rest)
    from lorax_train.plan import verdict  # brings in flax: after the typos
    from lorax_train.train import start

    return start.run(cfg, options, verdict.prepare)
  except (errors.UserError, OSError, KeyboardInterrupt) as error:
    return errors.report(error)


def parse(argv: Sequence[str]) -> config.TrainConfig:
  """The checked configuration of a command line.

  Raises:
    ConfigError: whatever absl, ml_collections or the config file objects to.
  """
  values = flags.FlagValues()
  try:
    with errors.quiet():
      config_flags.DEFINE_config_file(
        'config', None, '', flag_values=values, sys_argv=list(argv)
      )
      left = values(list(argv))[1:]
    mapping = values.config and values.config.to_dict()
  except Exception as error:  # the config file is the user's own code
    plain = isinstance(error, flags.Error | AttributeError | OSError)
    kind = '' if plain else f'{type(error).__name__}: '
    what = errors.first_and_last(error)
    raise errors.ConfigError(f'command line: {kind}{what}') from error
  if left:
    raise errors.ConfigError(f'command line: {left[0]!r} is no flag')
  if mapping is None:
    raise errors.ConfigError(
      'command line: --config=FILE is missing or its get_config() returns'
      ' nothing; e.g. --config configs/mistral_lora.py'
    )
  return config.from_mapping(mapping)


if __name__ == '__main__':
  sys.exit(main(sys.argv))
