"""Chat templates, toy tokenizers that treat the start of a text in all ways."""

import json

import tokenizers
from tokenizers import decoders, models, normalizers, pre_tokenizers, trainers

SPECIAL = ['<unk>', '<s>', '</s>', '<|im_start|>', '<|im_end|>']

TEXTS = [
  'Once upon a time there was a little girl who had a red ball.',
  'user assistant system Hello! Bye. Name a colour. Blue. Another? Red.',
  'The dog ran after the cat; the cat ran up the tree. [INST] hi [/INST]',
] * 4

# SmolLM2-Instruct's, with a shorter default.
CHATML = (
  "{% for message in messages %}{% if loop.first and messages[0]['role'] !="
  " 'system' %}{{ '<|im_start|>system\nHelp.<|im_end|>\n' }}{% endif %}"
  "{{'<|im_start|>' + message['role'] + '\n' + message['content'] +"
  " '<|im_end|>' + '\n'}}{% endfor %}{% if add_generation_prompt %}"
  "{{ '<|im_start|>assistant\n' }}{% endif %}"
)
# The same with transformers' marks, around content and end token.
CHATML_MARKED = (
  "{% for message in messages %}{% if loop.first and messages[0]['role'] !="
  " 'system' %}{{ '<|im_start|>system\nHelp.<|im_end|>\n' }}{% endif %}"
  "{{'<|im_start|>' + message['role'] + '\n'}}"
  "{% if message['role'] == 'assistant' %}{% generation %}"
  "{{ message['content'] + '<|im_end|>' }}{% endgeneration %}{% else %}"
  "{{ message['content'] + '<|im_end|>' }}{% endif %}{{ '\n' }}{% endfor %}"
  "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
# Marks that leave the end token out, as several templates of the hub do.
CHATML_MARKED_SHORT = CHATML_MARKED.replace(
  "{{ message['content'] + '<|im_end|>' }}{% endgeneration %}",
  "{{ message['content'] }}{% endgeneration %}{{ '<|im_end|>' }}",
)
# Llama 2's way: no prompt to ask for, BOS by name, contents trimmed.
INST = (
  '{% for message in messages %}{% if message.role == "user" %}'
  '{{ bos_token + "[INST] " + message.content.strip() + " [/INST]" }}'
  '{% elif message.role == "system" %}'
  '{{ raise_exception("no system messages, please") }}{% else %}'
  '{{ " " + message.content | trim + " " + eos_token }}{% endif %}{% endfor %}'
)
# White space between the tags, loop controls, tojson, a namespace.
LONG = """
{%- set seen = namespace(count=0) %}
{%- for message in messages %}
    {%- if message.role == 'skip' %}{% continue %}{% endif %}
    {%- set seen.count = seen.count + 1 %}
    {{- '<|im_start|>' ~ message.role ~ ' ' ~ seen.count }}
    {%- if message.name is defined %}
        {{- {'n': message.name, 'é': '<'} | tojson }}
    {%- endif %}
<s>{{ message.content }}</s>
    {% endfor %}
{%- if add_generation_prompt %}
    {{- '<|im_start|>assistant ' ~ (seen.count + 1) ~ '<s>' }}
{%- endif %}
"""

TEMPLATES = {
  'chatml': CHATML,
  'chatml, marked': CHATML_MARKED,
  'chatml, marked short': CHATML_MARKED_SHORT,
  'inst': INST,
  'long': LONG,
}


def tokenizer(kind):
  """A toy BPE tokenizer: its name says what is special about it."""
  if kind in ('bytes', 'stripping'):
    made = tokenizers.Tokenizer(models.BPE())
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
  else:
    made = tokenizers.Tokenizer(models.BPE(unk_token='<unk>'))
    alphabet = [chr(c) for c in range(10, 127)]
    if kind == 'prepend':
      made.normalizer = normalizers.Sequence(
        [normalizers.Prepend('▁'), normalizers.Replace(' ', '▁')]
      )
    else:
      scheme = kind.removeprefix('metaspace ')
      made.pre_tokenizer = pre_tokenizers.Metaspace('▁', scheme, split=True)
  special = [
    tokenizers.AddedToken(
      token,
      special=True,
      normalized=False,
      lstrip=kind == 'stripping' and token == '<|im_end|>',
      rstrip=kind == 'stripping' and token == '<|im_start|>',
    )
    for token in SPECIAL
  ]
  made.train_from_iterator(
    TEXTS,
    trainers.BpeTrainer(
      vocab_size=420,
      special_tokens=special,
      initial_alphabet=alphabet,
      show_progress=False,
    ),
  )
  return made


KINDS = [
  'bytes', 'stripping', 'metaspace first', 'metaspace always',
  'metaspace never', 'prepend',
]  # fmt: skip


def write(folder, kind='bytes', template=CHATML, **config):
  """A model directory of a toy tokenizer and a chat template."""
  folder.mkdir(exist_ok=True)
  tokenizer(kind).save(str(folder / 'tokenizer.json'))
  content = {
    'tokenizer_class': 'PreTrainedTokenizerFast',
    'bos_token': '<s>',
    'eos_token': '</s>',
    'unk_token': '<unk>',
    'add_bos_token': False,
    'clean_up_tokenization_spaces': False,
    **config,
  }
  if template is not None:
    content['chat_template'] = template
  (folder / 'tokenizer_config.json').write_text(json.dumps(content))
  return folder


def row(*turns):
  """A row of messages, by the letters of their roles: 'u:Hi', 'a:Hello.'."""
  roles = {'s': 'system', 'u': 'user', 'a': 'assistant'}
  return {
    'messages': [
      {'role': roles[turn[0]], 'content': turn[2:]} for turn in turns
    ]
  }


ROWS = [
  row('u:Hi', 'a:Hello!'),
  row('u:Name a colour.', 'a:Blue.', 'u:Another?', 'a:Red.'),
  row('s:Be brief.', 'u:Hello', 'a:Bye.'),
  row('u: two  spaces ', 'a:  and\nlines\n\n', 'u:\n', 'a:x '),
  row('u:', 'a:日本 🦙 é', 'u:👩‍💻', 'a:🇮🇹'),
]
