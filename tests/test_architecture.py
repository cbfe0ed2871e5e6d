"""Who may import whom, and what the code base must never hold.

Reference: the house and its floors in the design, written out below as
tables; imports are read off the syntax trees, lazy ones included.
"""

import ast
import re
import subprocess
import sys
from pathlib import Path

import pytest

import lorax_train

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / 'lorax_train'
FILES = sorted(PACKAGE.rglob('*.py'))
CONFIGS = sorted((ROOT / 'configs').glob('*.py'))

# Nobody imports from a floor above his own.
FLOORS = {
  'errors': 0,
  'hardware': 0,
  'lora': 1,
  'data': 1,
  'quant': 1,
  'parallel': 1,
  'distributed': 1,
  'together': 1,
  'checked': 1,
  'models': 2,
  'sections': 2,
  'config': 2,
  'formats': 3,
  'infer': 3,
  'train': 4,
  'plan': 5,
  'main': 5,
  '__main__': 6,
}

# Rooms of ours that a room may import from besides itself and `errors`, where
# that is narrower than its floor.
OURS = {
  'errors': set(),
  'hardware': set(),
  'lora': set(),
  'quant': {'lora.weight'},
  'data': set(),
  'parallel': {'lora'},
  'distributed': set(),
  'together': set(),
  'models': {'parallel', 'quant'},
  'checked': set(),
  'sections': {'checked'},
  'config': {'checked', 'lora', 'sections'},
  'formats': {'models.params', 'lora', 'quant', 'parallel', 'together'},
}

# What a room may import from elsewhere besides the standard library; rooms
# that are not listed may take any of these.
THEIRS = {
  'errors': set(),
  'hardware': set(),
  'checked': set(),
  'sections': set(),
  'config': set(),
  'lora': {'jax', 'numpy'},
  'quant': {'jax', 'numpy'},
  'parallel': {'jax', 'numpy'},
  'distributed': {'jax'},
  'together': {'jax', 'numpy'},
  'models': {'jax', 'flax', 'numpy'},
  'data': {
    'numpy', 'tokenizers', 'sentencepiece', 'datasets', 'huggingface_hub',
    'pyarrow', 'jinja2',
  },
}  # fmt: skip

# Packages that only some files may import; nobody may import the last ones.
ONLY_IN = {
  'absl': {'main.py'},
  'ml_collections': {'main.py'},
  'orbax': {'train/checkpoint.py'},
  'flax': {'models/'},
  'datasets': {'data/'},
  'pyarrow': {'data/arrow.py'},
  'tokenizers': {'data/library.py', 'data/sentencepiece_json.py'},
  'sentencepiece': {'data/library.py', 'data/sentencepiece_json.py'},
  'jinja2': {'data/jinja_worker.py'},
  'huggingface_hub': {'data/', 'formats/'},
  'gguf': {'formats/gguf.py'},
  'transformers': set(),
  'torch': set(),
  'peft': set(),
  'tensorflow': set(),
}


def room(file):
  """'train' of lorax_train/train/loop.py, 'main' of lorax_train/main.py."""
  first = file.relative_to(PACKAGE).parts[0]
  return first.removesuffix('.py')


def imports(file):
  """Every module that a file imports, dotted, `from a import b` as a.b."""
  for node in ast.walk(ast.parse(file.read_text('utf-8'))):
    if isinstance(node, ast.Import):
      yield from (alias.name for alias in node.names)
    elif isinstance(node, ast.ImportFrom):
      assert node.level == 0, f'{file}: a relative import'
      yield from (f'{node.module}.{alias.name}' for alias in node.names)


def ours(file):
  """The rooms of ours that a file imports from: 'lora', 'models.params'."""
  return {
    name.removeprefix('lorax_train.')
    for name in imports(file)
    if name.partition('.')[0] == 'lorax_train'
  }


def theirs(file):
  """The packages of others that a file imports."""
  tops = {name.partition('.')[0] for name in imports(file)}
  return tops - set(sys.stdlib_module_names) - {'lorax_train'}


def below(name, allowed):
  return any(name == a or name.startswith(a + '.') for a in allowed)


def short(file):
  return file.relative_to(PACKAGE).as_posix()


in_each_file = pytest.mark.parametrize('file', FILES, ids=short)


@in_each_file
def test_every_file_is_in_a_room_of_the_house(file):
  assert room(file) in FLOORS or file.name == '__init__.py'


@in_each_file
def test_nobody_imports_upward(file):
  if file == PACKAGE / '__init__.py':
    pytest.skip('the front door: it has a test of its own')
  own = FLOORS[room(file)]
  upward = {name for name in ours(file) if FLOORS[name.partition('.')[0]] > own}
  assert not upward


@in_each_file
def test_a_room_imports_only_what_it_may(file):
  here = room(file)
  allowed = OURS.get(here)
  if allowed is not None:
    friends = {here, *allowed} | ({'errors'} if here != 'lora' else set())
    assert not {n for n in ours(file) if not below(n, friends)}
  if here in THEIRS:
    assert theirs(file) <= THEIRS[here]


@in_each_file
def test_a_package_stays_behind_the_files_that_own_it(file):
  for package in theirs(file) & set(ONLY_IN):
    assert any(short(file).startswith(f) for f in ONLY_IN[package]), package


@in_each_file
def test_every_package_imported_is_a_dependency(file):
  declared = (ROOT / 'pyproject.toml').read_text('utf-8')
  listed = declared.partition('\ndependencies = [')[2].partition(']')[0]
  names = {
    re.split(r'[>=\[]', line.strip().strip('",'))[0].replace('-', '_')
    for line in listed.splitlines()
  }
  # absl-py, orbax-checkpoint; ml_dtypes comes with jax, pyarrow with datasets; gguf
  # is an extra of its own.
  names |= {'absl', 'orbax', 'ml_dtypes', 'pyarrow', 'gguf'}
  assert theirs(file) <= names


def test_a_config_imports_no_more_than_it_needs():
  assert CONFIGS
  for file in CONFIGS:
    assert ours(file) == {'config.defaults'}
    assert theirs(file) <= {'ml_collections'}


def test_the_front_door_opens_on_the_library_alone():
  assert not theirs(PACKAGE / '__init__.py')
  rooms = {'lora', 'infer.load.load'}
  assert {r for r in ours(PACKAGE / '__init__.py') if r[:5] != 'lora.'} == rooms
  for name in lorax_train.__all__:
    assert getattr(lorax_train, name)
  with pytest.raises(AttributeError, match="no attribute 'nothing'"):
    lorax_train.nothing  # noqa: B018


# (statement, packages that it must not bring in)
LEAN = [
  (
    'import lorax_train',
    [
      'jax',
      'flax',
      'optax',
      'transformers',
      'orbax',
      'datasets',
      'absl',
      'torch',
    ],
  ),
  (
    'import lorax_train.lora',
    ['flax', 'optax', 'transformers', 'orbax', 'datasets', 'absl', 'torch'],
  ),
  (
    'import lorax_train.data.tokenize, lorax_train.data.batches',
    ['flax', 'optax', 'transformers', 'orbax', 'datasets', 'absl', 'torch'],
  ),
  (
    'import lorax_train.main, lorax_train.__main__',
    ['flax', 'optax', 'transformers', 'orbax', 'datasets', 'torch'],
  ),
]


@pytest.mark.parametrize(('statement', 'heavy'), LEAN)
def test_an_import_brings_in_nothing_heavy(statement, heavy):
  code = (
    f'import sys; {statement};'
    f' print(*[m for m in {heavy!r} if m in sys.modules])'
  )
  done = subprocess.run(
    [sys.executable, '-c', code],
    cwd=ROOT,
    capture_output=True,
    text=True,
    timeout=60,
    check=True,
  )
  assert done.stdout.split() == []


FORBIDDEN = {
  'private parts of jax': r'jax\._src|jax\.interpreters|jax\.lib\b|\bpxla\b',
  'private modules': r'^\s*(from|import) (?!lorax_train)\S*\._\w',
  'pickle': r'\bimport pickle|\bfrom pickle|pickle\.load|\bdill\b|\bjoblib\b',
  'torch.load': r'torch\.load',
  'allow_pickle': r'allow_pickle\s*=\s*True',
  'remote code': r'trust_remote_code',
  'eval and exec': r'(?<![\w.])(eval|exec)\(',
  'a shell': r'os\.system|shell\s*=\s*True',
  'yaml.load': r'yaml\.load',
  'a salted hash': r'(?<![\w.])hash\(',
  'unfinished': r'\bTODO\b|\bFIXME\b|\bXXX\b|NotImplementedError',
  '__jax_array__': r'__jax_array__\s*=|def __jax_array__',
}  # fmt: skip


class _WithoutStrings(ast.NodeTransformer):
  def visit_Constant(self, node):
    return ast.Constant('') if isinstance(node.value, str) else node


def code_of(text):
  """What runs: no comments, no words in strings, and the spacing evened."""
  return ast.unparse(_WithoutStrings().visit(ast.parse(text)))


@pytest.mark.parametrize('what', FORBIDDEN)
def test_the_code_holds_none_of(what):
  pattern = re.compile(FORBIDDEN[what], re.MULTILINE)
  for file in [*FILES, *CONFIGS]:
    text = file.read_text('utf-8')
    # What is unfinished is said in comments.
    searched = text if what == 'unfinished' else code_of(text)
    assert not pattern.search(searched), file


@pytest.mark.parametrize(
  ('what', 'line'),
  [
    ('private parts of jax', 'from jax._src import core'),
    ('private modules', 'from flax._src import x'),
    ('pickle', 'import pickle'),
    ('torch.load', 'x = torch.load(path)'),
    ('allow_pickle', 'np.load(path, allow_pickle = True)'),
    ('remote code', 'load(path, trust_remote_code=flag)'),
    ('eval and exec', 'x = eval (text)'),
    ('a shell', 'os.system(text)'),
    ('a salted hash', 'key = hash(name)'),
    ('__jax_array__', 'class W:\n  def __jax_array__(self): pass'),
  ],
)
def test_forbidden_code_would_be_found(what, line):
  assert re.search(FORBIDDEN[what], code_of(line), re.MULTILINE)
  assert not re.search(FORBIDDEN[what], code_of(f'x = {line!r}'), re.MULTILINE)


@in_each_file
def test_no_file_is_past_400_lines(file):
  assert len(file.read_text('utf-8').splitlines()) <= 400


@in_each_file
def test_every_file_with_code_says_what_it_is_for(file):
  text = file.read_text('utf-8')
  assert not text.strip() or ast.get_docstring(ast.parse(text))


def test_errors_have_the_exit_codes_of_the_contract():
  from lorax_train import errors

  codes = {c.__name__: c.exit_code for c in errors.UserError.__subclasses__()}
  assert codes == {
    'ConfigError': 2,
    'DataError': 3,
    'ModelError': 4,
    'ResumeError': 5,
    'DivergedError': 6,
    'LockedError': 7,
    'StoppedError': 75,
  }
  assert errors.IO_EXIT_CODE == 74
