"""The KL divergence from the reference at evaluations: prompts of the training data, answered anew.

The steps themselves cannot tell it: their completions come from the data, not from the policy.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import numpy as np

from sage_jax import config
from sage_jax.data import encode
from sage_jax.generate import divergence, prompting, sampler
from sage_jax.runtime import setup


class Divergence:
    """Measures `eval_kl*` of weights; called with parameters like the rest of an evaluation.

    Args:
        run: the settings; `eval.kl_prompts` above 0.
        policy: the model, and the reference when there is no other.
        other: the reference, when it is not the starting policy.
        pairs: the training data, whose prompts are drawn from.
    """

    def __init__(
        self,
        run: config.Run,
        policy: setup.Policy,
        other: setup.Policy | None,
        pairs: encode.EncodedPairs,
    ):
        settings = run.eval
        count = min(settings.kl_prompts, len(pairs))
        chosen = np.random.default_rng(settings.seed).choice(len(pairs), count, replace=False)
        ids = [pairs.sequence(int(i), 0) for i in np.sort(chosen)]
        prompts = [list(map(int, tokens[:start])) for tokens, start in ids]
        self.rows, parts = policy.rows, sampler.parts(policy.rows)
        self.batch = -(-min(settings.batch, count) // parts) * parts
        length = -(-max(map(len, prompts)) // 32) * 32
        self.tokens_PT, self.valid_PT = sampler.left_pad(prompts, length)
        # The same keys each time: what differs from one evaluation to the next is the policy.
        keys = jax.random.split(jax.random.key(settings.seed), count)
        self.bits_P = np.asarray(jax.random.key_data(keys))
        self.policy, self.reference = policy, policy if other is None else other
        measure = divergence.make_sampled_kl(
            policy.model, self.reference.model, max_new_tokens=settings.max_new_tokens,
            eos_id=prompting.end_ids(policy.model, policy.tokenizer), rows=self.rows,
        )  # fmt: skip
        self.measure: Callable[..., divergence.SampledKL] = jax.jit(
            lambda params, reference, tokens, valid, bits: measure(
                params, reference, tokens, valid, jax.random.wrap_key_data(bits)
            ),
            out_shardings=sampler.everywhere(self.rows),
        )

    def __call__(self, params: Any) -> dict[str, float]:
        """`eval_kl`, nats an answer, its standard error `eval_kl_error`, `eval_kl_per_token`."""
        count, found = len(self.tokens_PT), []
        params, start = self.policy.whole(params), self.reference.whole(self.reference.params)
        for at in range(0, count, self.batch):
            # The last batch is filled up with copies: one shape, one program.
            index = np.minimum(np.arange(at, at + self.batch), count - 1)
            given = (self.tokens_PT[index], self.valid_PT[index], self.bits_P[index])
            part = self.measure(params, start, *sampler.spread(given, self.rows))
            found.append(jax.device_get(part))
        whole = divergence.SampledKL(
            *(np.concatenate(parts)[:count] for parts in zip(*found, strict=True))
        )
        return {f"eval_{k}": v for k, v in divergence.summarise(whole).items()}
