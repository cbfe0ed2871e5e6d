"""The rows of a run: read, tokenised, and put in order."""

from pathlib import Path

from lorax_train import config as config_lib
from lorax_train.config import TrainConfig
from lorax_train.data import prepare, tokenize, tokenized
from lorax_train.data.tokenize import Tokenizer
from lorax_train.errors import DataError, ModelError
from lorax_train.models.params import DecoderConfig
from lorax_train.train.rows import Rows, arrange


def read_rows(
  cfg: TrainConfig, model_dir: Path, model_cfg: DecoderConfig
) -> Rows:
  """Reads, tokenises and splits the rows.

  Raises:
    DataError: bad rows, or none left.
    ModelError: the tokenizer, or that it does not fit the embedding.
  """
  tokenizer = read_tokenizer(cfg, model_dir, model_cfg)

  options = prepare.Options(
    cfg.data.max_length,
    cfg.data.truncation,
    cfg.data.on_bad_row,
    cfg.data.cache,
    cfg.data.separator,
  )

  def read(path: str, template: str, key: str) -> tokenized.TokenizedSet:
    try:
      rows = prepare.prepare(path, template, tokenizer, options)
    except DataError as error:
      told = str(error).replace('--config.data.path', f'--config.data.{key}')
      raise DataError(told) from error
    tokenized.check_ids(rows, model_cfg.vocab)
    return rows

  sources = config_lib.sources(cfg.data)
  key = 'mixture' if cfg.data.mixture else 'path'
  tokenised = [read(each.path, each.template, key) for each in sources]
  eval_set = None
  if cfg.data.eval_path:
    eval_set = read(cfg.data.eval_path, cfg.data.template, 'eval_path')
  return arrange(cfg, tokenised, eval_set, tokenizer)


def read_tokenizer(
  cfg: TrainConfig, model_dir: Path, model_cfg: DecoderConfig
) -> Tokenizer | None:
  """The model's tokenizer; rows of token ids can do without one."""
  try:
    tokenizer = tokenize.load_tokenizer(model_dir)
  except ModelError:
    sources = config_lib.sources(cfg.data)
    templates = {each.template for each in sources}
    if cfg.data.eval_path:
      templates.add(cfg.data.template)
    if templates == {'tokens'}:
      return None
    raise
  tokenize.check_vocabulary(tokenizer, model_cfg.vocab)
  return tokenizer
