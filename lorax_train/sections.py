"""The sections of a configuration: every key with its default and its limits.

Strings that are '' and numbers that are 0 mean "not used" where the text says so,
so that every key has one type and can be overridden on the command line.
"""

import dataclasses

from lorax_train.checked import key as _key

_TEMPLATES = (
  'alpaca',
  'uno_reverse',
  'text',
  'prompt_completion',
  'choice',
  'chat',
  'sharegpt',
  'mistral_v1',
  'mistral_v3',
  'mistral_v3_tekken',
  'tokens',
)
_OWN_TEMPLATE = '{}:'


@dataclasses.dataclass(frozen=True)
class ModelSection:
  """The base model.

  Attributes:
    path: directory in Hugging Face format, or a hub id.
    init: where the weights come from: the files of path, or random, by its
      config.json and train.seed, for which path needs no weights.
    untie: make a head that is tied to the embedding a leaf of its own, so that
      one of them can be trained alone.
    dtype: compute dtype of the layers.
    param_dtype: dtype the frozen weights are stored in. With method=full the
      trained ones are float32; this is what the model sees of them, and what
      is written.
    quant: how the linears of the layers are stored: nf4 (4 bits, QLoRA), int8,
      or as param_dtype says (none). Weights whose files are quantised already
      stay what they are.
    attention: who computes attention: xla (plain, everywhere), splash (a kernel
      for TPUs), cudnn (one for NVIDIA GPUs, in bfloat16); auto takes the
      best that the mesh's devices have.
    remat: what the backward pass makes again: nothing, of layers all but their
      products (dots), gate and up too (mlp), or whole layers (full); auto is the
      first of dots, mlp and full that fits the devices.
  """

  path: str = ''
  init: str = _key('weights', choices=('weights', 'random'))
  untie: bool = False
  dtype: str = _key('bfloat16', choices=('bfloat16', 'float32'))
  param_dtype: str = _key('bfloat16', choices=('bfloat16', 'float32'))
  quant: str = _key('none', choices=('none', 'nf4', 'int8'))
  attention: str = _key('auto', choices=('auto', 'xla', 'splash', 'cudnn'))
  remat: str = _key('auto', choices=('auto', 'none', 'dots', 'mlp', 'full'))


@dataclasses.dataclass(frozen=True)
class LoraSection:
  """The adapters; see `lora.LoraSpec` for the matching rules.

  Attributes:
    targets: module names with commas, a regex, or all-linear.
    rank: r.
    alpha: the update is scaled by alpha / r (rslora: alpha / sqrt(r)).
    dropout: rate on the adapters' input.
    variant: lora, or of rslora, dora and lora_fa one or more with + between.
    init: how A and B begin: default, gaussian, orthogonal, or from the base:
      pissa, olora; loftq with what a quantised base lost, qera with what its
      outputs lost over rows of the run; whitened along the inputs that such
      rows give, each direction at one size.
    exclude: names or a regex that win over targets; '' for none.
    rank_pattern: other ranks by regex: 'down_proj=16,layers.0.*=4'.
    alpha_pattern: other alphas by regex, likewise.
    layers_to_transform: indices of the layers to adapt, '0,1,2'; '' for all.
    modules_to_save: names of modules that are trained whole, without an
      adapter, 'lm_head,norm': all whose path ends so. Wins over targets.
    trainable_token_indices: token ids whose rows of the embedding are trained,
      '0,32000'.
    init_from: PEFT adapter directory to start from; '' for fresh factors.
      rank, alpha, targets and so on are then the adapter's own.
  """

  targets: str = 'q_proj,v_proj'
  rank: int = _key(8, at_least=1)
  alpha: float = 16.0
  dropout: float = _key(0.0, at_least=0, below=1)
  variant: str = 'lora'
  init: str = 'default'
  exclude: str = ''
  rank_pattern: str = ''
  alpha_pattern: str = ''
  layers_to_transform: str = ''
  modules_to_save: str = ''
  trainable_token_indices: str = ''
  init_from: str = ''


@dataclasses.dataclass(frozen=True)
class MezoSection:
  """Steps without gradients, of method mezo; see docs/mezo.md.

  Attributes:
    weights: what is trained: the adapters of the section lora (lora), or all
      weights of the model, in model.param_dtype (all).
    epsilon: how far the weights are moved to either side.
    probes: random directions of a step, which goes along their mean; each costs
      two forward passes.
  """

  weights: str = _key('lora', choices=('lora', 'all'))
  epsilon: float = _key(1e-2, above=0)
  probes: int = _key(1, at_least=1)


@dataclasses.dataclass(frozen=True)
class Source:
  """One of several sources of rows.

  Attributes:
    path: see `data.path`.
    weight: its share of what is trained on is this over the sum of all.
    template: see `data.template`; '' for that.
  """

  path: str = ''
  weight: float = _key(1.0, above=0)
  template: str = _key('', choices=('', *_TEMPLATES), own=_OWN_TEMPLATE)


@dataclasses.dataclass(frozen=True)
class DataSection:
  """The rows.

  Attributes:
    path: .json, .jsonl, .csv, .tsv or .txt file (also .gz), .parquet, .arrow or
      .feather file, a directory of files of one of these kinds or made by
      `save_to_disk`, or a hub id.
    mixture: in place of `path` several of them with weights, ({'path':
      'a.json', 'weight': 0.7, 'template': 'text'}, {'path': 'b.jsonl',
      'weight': 0.3}); weight and template may be left out, for 1 and
      data.template. Weights count rows, with data.packing packs, each of rows
      of one source; eval.rows are split by them.
    template: how a row becomes a prompt and what is learned, by name (chat is
      the model's own chat template, see docs/chat.md); or a
      format string over its columns, learned from {|} on,
      'Q: {question} A:{|} {answer}'; or a function, 'module:function', that
      makes of a row a dict of prompt and completion. Texts to choose from are
      given by choice, or '{text:strip} It was{|} {label:0=bad,1=good}', see
      docs/choice.md.
    separator: what stands between two documents of a .txt file, each of which
      is a row with the one column text; '' for a file that is one document.
    rows: so many rows of `path`, drawn at random, are trained on, and eval.rows
      others are held out, however many; 0 for all.
    eval_path: held-out rows, in data.template; '' takes eval.rows rows out of
      `path` or `mixture`.
    max_length: longest row in tokens.
    truncation: a longer row is dropped, has its prompt cut on the left, its end
      cut on the right, or is an error. What is learned is only ever cut on the
      right: such a row has no EOS, and how many there are is said.
    on_bad_row: a row that does not fit the template is an error or skipped.
    packing: rows to train on stand side by side in packs of max_length tokens,
      and none sees another. Steps, epochs and train.batch_size then count
      packs. Held-out rows are not packed.
    buckets: the other way to little padding, '128,256,512': rows to train on
      are in batches of rows of about one length, each padded to the least of
      these lengths that holds it, and the step is compiled for each; '' for
      batches of one length. A longer row has a bucket of its own.
    cache: tokenised rows are kept in ~/.cache/lorax_train/rows (or in that of
      XDG_CACHE_HOME) and read from there by the next run.
  """

  path: str = ''
  mixture: tuple[Source, ...] = ()
  template: str = _key('alpaca', choices=_TEMPLATES, own=_OWN_TEMPLATE)
  separator: str = '<|endoftext|>'
  rows: int = _key(0, at_least=0)
  eval_path: str = ''
  max_length: int = _key(512, at_least=2)
  truncation: str = _key('drop', choices=('drop', 'left', 'right', 'error'))
  on_bad_row: str = _key('error', choices=('error', 'skip'))
  packing: bool = False
  buckets: str = ''
  cache: bool = True


@dataclasses.dataclass(frozen=True)
class TrainSection:
  """Optimisation of what is trained.

  Attributes:
    steps: optimizer steps.
    loss: of rows of choices what is learned: to tell the right one from the
      others (choices), or its tokens alone (tokens, as of rows without); auto is
      choices where rows have them.
    batch_size: rows of a micro-batch, over all devices; with data.packing,
      packs.
    grad_accum: micro-batches of a step.
    optimizer: adamw, adafactor (a row and a column of second moments a matrix),
      muon (the layers' matrices by Muon, the rest by AdamW; with method=full),
      lion, or sgd.
    learning_rate: the peak.
    lora_plus_ratio: B learns at so many times that rate; 1 for no difference.
    neftune_alpha: strength of the noise on the embeddings; 0 for none.
    loss_chunk: tokens whose logits a device holds at once; 0 for 2^25 / vocab.
    schedule: what follows the warm-up.
    warmup_steps: steps of linear rise from 0.
    weight_decay: decoupled decay; with method=full not of norms.
    momentum: Muon's and sgd's; 0 for none.
    beta1: Adam's and Lion's.
    beta2: Adam's and Lion's.
    epsilon: Adam's.
    clip_norm: largest norm of the gradient; 0 for no clipping.
    seed: of factors, dropout and data order.
    log_every: steps between two progress lines.
  """

  steps: int = _key(1000, at_least=1)
  loss: str = _key('auto', choices=('auto', 'tokens', 'choices'))
  batch_size: int = _key(8, at_least=1)
  grad_accum: int = _key(1, at_least=1)
  optimizer: str = _key(
    'adamw', choices=('adamw', 'adafactor', 'muon', 'lion', 'sgd')
  )
  learning_rate: float = _key(2e-4, at_least=0)
  lora_plus_ratio: float = _key(1.0, at_least=0)
  neftune_alpha: float = _key(0.0, at_least=0)
  loss_chunk: int = _key(0, at_least=0)
  schedule: str = _key('cosine', choices=('constant', 'linear', 'cosine'))
  warmup_steps: int = _key(0, at_least=0)
  weight_decay: float = _key(0.0, at_least=0)
  momentum: float = _key(0.95, at_least=0, below=1)
  beta1: float = _key(0.9, at_least=0, below=1)
  beta2: float = _key(0.999, at_least=0, below=1)
  epsilon: float = _key(1e-8, at_least=0)
  clip_norm: float = _key(1.0, at_least=0)
  seed: int = _key(0, at_least=0)
  log_every: int = _key(10, at_least=1)


@dataclasses.dataclass(frozen=True)
class MeshSection:
  """Sizes of the mesh axes; one of them may be -1 for what is left.

  Attributes:
    data: copies of the model, each with its rows.
    fsdp: parts that the weights are cut into, each with its rows.
    tensor: parts that heads and the MLP are cut into.
  """

  data: int = _key(1, at_least=-1)
  fsdp: int = _key(-1, at_least=-1)
  tensor: int = _key(1, at_least=-1)


@dataclasses.dataclass(frozen=True)
class CheckpointSection:
  """Checkpoints of adapters and optimizer.

  Attributes:
    every: steps between two; the last step has one in any case.
    keep: how many stay on disk.
  """

  every: int = _key(200, at_least=1)
  keep: int = _key(2, at_least=1)


@dataclasses.dataclass(frozen=True)
class EvalSection:
  """Loss on held-out rows.

  Attributes:
    every: steps between two evaluations; before the first and after the last
      step there is one in any case.
    rows: rows held out of data.path or data.mixture (of each source a tenth at
      most, unless data.rows says how many are left); 0 for none.
    samples: held-out prompts that are continued at each evaluation, for
      samples.md; 0 for none.
  """

  every: int = _key(100, at_least=1)
  rows: int = _key(64, at_least=0)
  samples: int = _key(3, at_least=0)
