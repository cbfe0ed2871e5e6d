"""What a run needs before its first step: rows, adapters, mesh, state."""

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from lorax_train import config as config_lib
from lorax_train import lora, parallel
from lorax_train.config import TrainConfig
from lorax_train.errors import ConfigError
from lorax_train.formats import peft, quant_config, quantised
from lorax_train.lora.halves import is_half
from lorax_train.lora.init import FROM_LOST
from lorax_train.lora.matching import flat
from lorax_train.models import attention
from lorax_train.models import params as params_lib
from lorax_train.models.mistral import Decoder
from lorax_train.models.params import DecoderConfig
from lorax_train.train import mezo, optim
from lorax_train.train import state as state_lib
from lorax_train.train import step as step_lib
from lorax_train.train.step import TrainState

Tree = Any
# See `lora.split`.
Givens = Callable[[str, int], Any]


class Adapters(NamedTuple):
  """What is trained of a model.

  Attributes:
    model_cfg: the model as the run sees it: a head that its files tie to the
      embedding may be a leaf of its own.
    names: {path: module names} of what may be adapted.
    norms: the same of what may only be trained whole.
    layout: {path: letters of its axes}.
    spec: what is.
    placed: that for each module.
    loaded: the adapter to start from.
    whole: whether it is all weights themselves, in place and in their dtype.
  """

  model_cfg: DecoderConfig
  names: dict[str, tuple[str, ...]]
  norms: dict[str, tuple[str, ...]]
  layout: dict[str, str]
  spec: lora.LoraSpec
  placed: dict[str, lora.Placement | lora.Whole]
  loaded: peft.LoadedAdapter | None
  whole: bool = False

  @property
  def all_names(self) -> dict[str, tuple[str, ...]]:
    """Of all modules."""
    return {**self.names, **self.norms}

  def split(
    self, key: jax.Array, params: Tree, givens: Givens | None = None
  ) -> tuple[Tree, Tree]:
    """(frozen, trainable), see `lora.split`."""
    if self.whole:
      return lora.all_whole(params, self.layout)
    return lora.split(
      key,
      params,
      self.placed,
      self.names,
      self.layout,
      self.norms,
      givens,
    )


def plan_adapters(cfg: TrainConfig, model_cfg: DecoderConfig) -> Adapters:
  """Resolves the targets, or takes those of the adapter to start from.

  With method=full every module is trained whole.

  Raises:
    ConfigError: targets that match nothing, or another model.quant than the
      files have.
    ModelError: lora.init_from does not fit.
  """
  model_cfg = quant_config.as_asked(model_cfg, cfg.model.quant)
  if config_lib.trains_all(cfg):
    if model_cfg.quant.kind != 'none':
      raise ConfigError(
        f'method={cfg.method}: the weights of {cfg.model.path} are quantised,'
        ' and stay so: take unquantised ones, or train adapters'
      )
    one = model_cfg.tied and not cfg.model.untie
    every = no_adapters(dataclasses.replace(model_cfg, tied=one))
    if cfg.method == 'mezo':
      return every._replace(whole=True)
    names = flat(every.all_names)
    return every._replace(placed={name: lora.Whole() for name in names})
  if cfg.lora.init_from:
    loaded = peft.load_adapter(Path(cfg.lora.init_from).expanduser())
    model_cfg, loaded, placed = peft.on_model(loaded, model_cfg)
    if cfg.model.untie and model_cfg.tied:
      raise ConfigError(
        'model.untie: the adapter of lora.init_from was made for a head that is'
        ' the embedding; leave it out'
      )
    plan = no_adapters(model_cfg)
    return plan._replace(spec=loaded.spec, placed=placed, loaded=loaded)
  if cfg.model.untie and model_cfg.tied:
    if cfg.lora.trainable_token_indices:
      raise ConfigError(
        'model.untie with lora.trainable_token_indices: PEFT puts such rows of a'
        ' tied embedding into the head as well; leave one of them out'
      )
    model_cfg = dataclasses.replace(model_cfg, tied=False)
  none = no_adapters(model_cfg)
  spec = config_lib.lora_spec(cfg.lora)
  if spec.init in FROM_LOST and model_cfg.quant.stored:
    raise ConfigError(
      f'lora.init={spec.init}: the files of {cfg.model.path} hold quantised weights'
      ' alone, and not what they lost: give the model they were made of, with'
      f' model.quant={model_cfg.quant.kind}'
    )
  try:
    placed = lora.resolve(spec, flat(none.names), others=flat(none.norms))
  except ValueError as error:
    tied = '; the head is tied to embed_tokens, model.untie=True parts them'
    hint = tied if model_cfg.tied and 'lm_head' in str(error) else ''
    raise ConfigError(f'lora: {error}{hint}') from None
  embedding = [
    place for name, place in placed.items() if name.endswith('embed_tokens')
  ]
  if model_cfg.tied and any(getattr(p, 'dora', False) for p in embedding):
    raise ConfigError(
      'lora: DoRA of an embedding that is the head too: its columns are not'
      " the head's; give model.untie=True, or leave it out"
    )
  return none._replace(spec=spec, placed=placed)


def no_adapters(model_cfg: DecoderConfig) -> Adapters:
  """A model of which nothing is trained."""
  return Adapters(
    model_cfg,
    params_lib.module_names(model_cfg),
    params_lib.norm_names(model_cfg),
    params_lib.layout(model_cfg),
    lora.LoraSpec(),
    {},
    None,
  )


def abstract(
  cfg: TrainConfig, adapters: Adapters, mesh: jax.sharding.Mesh | None = None
) -> tuple[Tree, Tree]:
  """(frozen, trainable) as shapes, on a mesh as it will lie: without weights.

  Raises:
    ConfigError: an adapter that these weights can't have.
  """
  model_cfg = adapters.model_cfg
  params = params_lib.abstract(model_cfg, jnp.dtype(cfg.model.param_dtype))
  matrices = {
    p.path: params_lib.shape(model_cfg, p)[-2:]
    for p in params_lib.table(model_cfg)
  }

  def given(path: str, layer: int) -> Any:
    n_in, n_out = matrices[path]
    original, moments = jnp.zeros((n_in, n_out)), jnp.zeros((n_in, n_in))
    of = {'whitened': moments, 'qera': (original, moments)}
    return of.get(adapters.spec.init, original)

  try:
    frozen, trainable = jax.eval_shape(
      lambda p: adapters.split(jax.random.key(0), p, given), params
    )
  except ValueError as error:
    raise ConfigError(f'lora: {error}') from None
  return (frozen, trainable) if mesh is None else _on_mesh(frozen, trainable, model_cfg, mesh)  # fmt: skip


def _on_mesh(
  frozen: Tree,
  trainable: Tree,
  model_cfg: DecoderConfig,
  mesh: jax.sharding.Mesh,
) -> tuple[Tree, Tree]:
  """Shapes with where they lie: base weights by their rows in PARAMS."""
  of_base = {
    p.path: parallel.sharding(mesh, p.axes, params_lib.axis_units(model_cfg, p))
    for p in params_lib.table(model_cfg)
  }

  def place(path: tuple, half: Any) -> Any:
    own = of_base[lora.path_of(path)]
    if isinstance(half, lora.Adapter) or getattr(half, 'w', half) is None:
      return half  # an adapter lies as its weight does, which is not here
    if lora.is_trained(half):
      return dataclasses.replace(half, w=quantised.lying(half.w, own))
    return quantised.lying(half, own)

  is_leaf = lambda x: is_half(x) or isinstance(x, lora.Adapter)  # noqa: E731
  frozen, trainable = (
    jax.tree_util.tree_map_with_path(place, tree, is_leaf=is_leaf)
    for tree in (frozen, trainable)
  )
  return (
    jax.tree.map(state_lib.lying, frozen, parallel.frozen_shardings(frozen)),
    jax.tree.map(
      state_lib.lying,
      trainable,
      parallel.trainable_shardings(frozen, trainable),
    ),
  )


def attention_kernel(
  cfg: TrainConfig, model_cfg: DecoderConfig, platform: str
) -> str:
  """Who computes attention on devices of a platform.

  Raises:
    ConfigError: the kernel of model.attention can't.
  """
  try:
    return attention.choose(
      cfg.model.attention,
      platform,
      model_cfg.head_dim,
      cfg.model.dtype,
    )
  except ValueError as error:
    raise ConfigError(f'model.attention: {error}') from None


def make_apply(
  cfg: TrainConfig, model_cfg: DecoderConfig, kernel: attention.Kernel = 'xla'
) -> step_lib.Apply:
  """(params, ids) -> what stands before the head, by the run's dtype and remat.

  Of packs, (params, ids, positions, segments). `kernel` is who computes
  attention, from `attention_kernel`.
  """
  remat = 'full' if cfg.model.remat == 'auto' else cfg.model.remat
  model: Any = Decoder(
    model_cfg, jnp.dtype(cfg.model.dtype), remat, kernel, head=False
  )
  return lambda params, ids, positions=None, segments=None: model.apply(
    {'params': params}, ids, positions, segments_BT=segments
  )


def make_mesh(cfg: TrainConfig) -> jax.sharding.Mesh:
  """The mesh of the configuration, which must be able to cut its batches.

  Raises:
    ConfigError: it does not fit the devices or the batch.
  """
  try:
    mesh = parallel.make_mesh(cfg.mesh.data, cfg.mesh.fsdp, cfg.mesh.tensor)
  except ValueError as error:
    raise ConfigError(str(error)) from None
  check_batch(cfg, mesh)
  return mesh


def check_batch(cfg: TrainConfig, mesh: Any) -> None:
  """Raises ConfigError where a mesh cannot cut the run's batches."""
  ways = parallel.batch_ways(mesh)
  if cfg.train.batch_size % ways:
    raise ConfigError(
      f'train.batch_size={cfg.train.batch_size}: the mesh cuts a batch into'
      f' {ways} parts (data {mesh.shape["data"]} x fsdp'
      f' {mesh.shape["fsdp"]}); give a multiple of {ways}'
    )


def optim_config(cfg: TrainConfig) -> optim.OptimConfig:
  """What the optimizer needs of the configuration."""
  names = {*optim.OptimConfig.__dataclass_fields__} - {'full'}
  of_train = {n: getattr(cfg.train, n) for n in names}
  return optim.OptimConfig(**of_train, full=cfg.method == 'full')


def optimizer(cfg: TrainConfig) -> optax.GradientTransformation:
  """What makes steps of gradients, and its state; none of either for MeZO."""
  if cfg.method == 'mezo':
    return optax.identity()
  return optim.make_optimizer(optim_config(cfg))


def split(
  cfg: TrainConfig,
  params: Tree,
  adapters: Adapters,
  givens: Givens | None = None,
) -> tuple[Tree, Tree]:
  """Factors beside the weights, lying as the weights do.

  `givens` are what their way of beginning wants, see `lora.split`.
  """
  if adapters.loaded is None:
    key = jax.random.key(cfg.train.seed)
    frozen, trainable = adapters.split(key, params, givens)
  else:
    frozen, trainable = peft.attach(
      adapters.loaded, adapters.placed, adapters.model_cfg, params
    )

  return (
    parallel.put(frozen, parallel.frozen_shardings(frozen)),
    parallel.put(trainable, parallel.trainable_shardings(frozen, trainable)),
  )


def make_step(
  cfg: TrainConfig,
  model_cfg: DecoderConfig,
  tx: optax.GradientTransformation,
  frozen: Tree,
  state: TrainState,
  mesh: jax.sharding.Mesh,
  kernel: attention.Kernel,
) -> Any:
  """The train step under jit, see `step.make_train_step`; the state is donated.

  Args:
    cfg: the run.
    model_cfg: the model as the run sees it.
    tx: the optimizer.
    frozen: arrays or shapes.
    state: likewise, each with where it lies, before the step and after.
    mesh: devices.
    kernel: who computes attention.
  """
  apply = make_apply(cfg, model_cfg, kernel)
  step: Any
  if cfg.method == 'mezo':
    step = mezo.make_train_step(
      apply,
      optim.make_schedule(optim_config(cfg)),
      mezo.root_key(cfg.train.seed),
      mezo_config(cfg),
      cfg.train.loss_chunk,
    )
  else:
    step = step_lib.make_train_step(
      apply,
      tx,
      noise_key(cfg, frozen),
      cfg.train.neftune_alpha,
      cfg.train.loss_chunk,
    )
  return jax.jit(
    step,
    donate_argnums=0,
    out_shardings=(state_lib.shardings_of(state), parallel.replicated(mesh)),
  )


def mezo_config(cfg: TrainConfig) -> mezo.MezoConfig:
  """How a step of method mezo looks around."""
  # jax's batching of cuDNN's attention leaves the mask of packs as it is.
  at_once = not config_lib.trains_all(cfg) and not cfg.data.packing
  return mezo.MezoConfig(cfg.mezo.epsilon, cfg.mezo.probes, at_once)


def noise_key(cfg: TrainConfig, frozen: Tree) -> jax.Array | None:
  """Root key of dropout and NEFTune, apart from the factors'; None without."""
  is_fixed = lambda x: isinstance(x, lora.Fixed)  # noqa: E731
  halves = filter(is_fixed, jax.tree.leaves(frozen, is_leaf=is_fixed))
  if not cfg.train.neftune_alpha and all(half.rate is None for half in halves):
    return None
  return jax.random.fold_in(jax.random.key(cfg.train.seed), 1)
