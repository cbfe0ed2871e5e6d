"""Our tokenizer.json against sentencepiece and mistral_common, text by text.

  python scripts/check_tokenizers.py --shared ../shared

Ids of every distinct text of the data there (fields of rows, the rows as
rendered by their templates, lines, paragraphs) and of random Unicode strings,
counted apart. One line a tokenizer, a reference and a kind of text, with how
many texts differ; the first few that do are printed. Exit 1 on any difference.
mistral_common is left out where it is not installed.
"""

import argparse
import random
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import sentencepiece
import tokenizers

from lorax_train.data import sentencepiece_json
from lorax_train.data.source import read_rows
from lorax_train.data.template import alpaca

VERSIONS = ('mistral-v1', 'mistral-v3')
WORDS = (
  ' ', '  ', '   ', '▁', '\n', '\t', '\0', 'the', 'un', '==', '</s>', '[INST]',
  '<0x0A>', '<unk>', 'é', 'e\u0301', '日本', '🙂', '👩‍👩‍👧', '1234', '\u200b',
)  # fmt: skip
Encode = Callable[[list[str]], list[list[int]]]


def main() -> int:
  """Compares; returns the exit code."""
  parser = argparse.ArgumentParser(description=__doc__)
  parser.add_argument('--shared', type=Path, default=Path('../shared'))
  parser.add_argument('--random', type=int, default=50_000)
  args = parser.parse_args()
  kinds = {
    'real': sorted(set(real_texts(args.shared / 'data'))),
    'random': sorted(set(random_texts(args.random))),
  }
  different = 0
  for version in VERSIONS:
    path = args.shared / 'tokenizers' / version / 'tokenizer.model'
    reference, ours, *others = encoders(path)
    for kind, texts in kinds.items():
      wanted, seconds = timed(reference[1], texts)
      ids = sum(map(len, wanted))
      print(f'{version} {kind}: {len(texts)} texts, {ids} ids, {seconds:.1f} s')
      for name, encode in (ours, *others):
        given, seconds = timed(encode, texts)
        differ = [n for n, pair in enumerate(zip(given, wanted, strict=True))
                  if pair[0] != pair[1]]  # fmt: skip
        print(f'  {name}: {len(differ)} differ, {seconds:.1f} s', flush=True)
        for n in differ[:3]:
          print(f'    {texts[n][:200]!r}')
        different += len(differ)
    decode = tokenizers.Tokenizer.from_str(written(path)).decode_batch
    model = sentencepiece.SentencePieceProcessor(model_file=str(path))
    for kind, texts in kinds.items():
      ids_of = model.encode(texts, out_type=int)
      pairs = zip(decode(ids_of), model.decode(ids_of), strict=True)
      differ = [n for n, (a, b) in enumerate(pairs) if a != b]
      print(f'{version} {kind} decoded: {len(differ)} differ', flush=True)
      different += len(differ)
  return int(different > 0)


def written(path: Path) -> str:
  """tokenizer.json as it would be on disk."""
  return sentencepiece_json.build(path).to_str()


def encoders(path: Path) -> list[tuple[str, Encode]]:
  """(name, texts to ids): sentencepiece, ours, mistral_common if there."""
  model = sentencepiece.SentencePieceProcessor(model_file=str(path))
  ours = tokenizers.Tokenizer.from_str(written(path))
  ours.encode_special_tokens = True

  def encode(texts: list[str]) -> list[list[int]]:
    made = ours.encode_batch_fast(texts, add_special_tokens=False)
    return [encoding.ids for encoding in made]

  found: list[tuple[str, Encode]] = [
    ('sentencepiece', lambda texts: model.encode(texts, out_type=int)),
    ('tokenizer.json', encode),
  ]
  try:
    from mistral_common.tokens.tokenizers.sentencepiece import (
      SentencePieceTokenizer,
    )
  except ImportError:
    print('mistral_common is not installed: not compared')
    return found
  theirs = SentencePieceTokenizer(str(path))
  one = lambda text: theirs.encode(text, bos=False, eos=False)  # noqa: E731
  return [*found, ('mistral_common', lambda texts: [one(t) for t in texts])]


def real_texts(data: Path) -> Iterator[str]:
  """Texts of the data sets, as they stand and as templates render them."""
  for name in ('alpaca_51924.json.gz', 'alpaca_gpt4_999.json'):
    rows = read_rows(str(data / name))
    for row in rows:
      yield from (str(value) for value in row.fields.values())
    for row in rows:
      prompt, completion = alpaca(row.fields)[:2]
      yield from (prompt, completion, prompt + completion)
  lines = (data / 'sst2_train_6735.tsv').read_text('utf-8').splitlines()
  yield from (line.split('\t')[0] for line in lines)
  for row in read_rows(str(data / 'wikisql_train.jsonl')):
    yield row.fields['text']
    yield from row.fields['text'].split('\n')
  stories = (data / 'tinystories_v2_1MB.txt').read_text('utf-8')
  yield from stories.split('\n')
  yield from stories.split('<|endoftext|>')
  yield stories


def random_texts(count: int, seed: int = 0) -> Iterator[str]:
  """Strings of any code points, of words with a meaning to a tokenizer, both."""
  rng = random.Random(seed)

  def character() -> str:
    top = rng.choice((0x80, 0x800, 0x10000, 0x110000))
    code = rng.randrange(top)
    return chr(code if not 0xD800 <= code < 0xE000 else 0x25)

  for _ in range(count):
    odds = rng.choice((0.0, 0.5, 1.0))
    yield ''.join(
      rng.choice(WORDS) if rng.random() < odds else character()
      for _ in range(rng.randrange(40))
    )
  yield from (' ' * n + 'x' * (n % 3) for n in range(200))
  yield from (letter * 20_000 for letter in 'a 日')


def timed(encode: Encode, texts: list[str]) -> tuple[list[list[int]], float]:
  """What it gives, and the CPU seconds it took."""
  began = time.process_time()
  return encode(texts), time.process_time() - began


if __name__ == '__main__':
  sys.exit(main())
