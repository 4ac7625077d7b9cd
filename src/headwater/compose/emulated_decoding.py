"""Two other ways to decode from an emulated fine-tuning: inside a ``generate`` call of one's own, and speculatively.

    accept y ~ q with probability min(1, pi(y) / q(y)),  else draw from (pi - q)+ / sum (pi - q)+

where q is the small tuned model that drafts and pi the composed distribution: what comes out is distributed as pi.

Source: Mitchell et al., arXiv:2310.12962, section 5.3 (speculative up-scaling); the acceptance rule is that of
Leviathan et al., arXiv:2211.17192.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import LogitsProcessor, PreTrainedModel

from headwater.compose.emulated_finetuning import EmulatedModel, FilterBy, Tuned, emulated_log_probs
from headwater.compose.side_by_side import SideBySide, SideBySideCache

__all__ = ["EmulatedLogitsProcessor", "Speculated", "accept_drafts", "speculative_generate"]


class EmulatedLogitsProcessor(LogitsProcessor):  # type: ignore[misc]  # transformers ships no types
    """Emulated fine-tuning inside the large model's own ``generate``.

    ``EmulatedModel`` is the plainer way; this is for a ``generate`` call that must stay as it is. A processor sees
    token ids only, so the small models' caches follow what the ids say: new tokens are fed, beams are found again by
    their tokens, and anything else is read anew. A cache that does not belong to the ids is never used.

    A processor passed to ``generate`` runs after those for bans and penalties, which thus act on the large model alone,
    and before temperature, top-k and top-p. A token that is ruled out before stays ruled out.

    Args:
        small: the base of the tuned models.
        tuned: as in ``EmulatedModel``.
        scale: of the correction.
        top_p: see ``emulated_log_probs``.
        filter_by: see ``emulated_log_probs``.
        cache: keep keys and values; without, every step reads the whole text again.
        pad_token_id: tokens of this id at the start of a row are padding. None: only ``set_prompt_mask`` says so.

    Raises:
        ValueError: as ``EmulatedModel``; or a padding token that is also an end token, so that ids do not tell.

    Example:
        ``large.generate(ids, logits_processor=LogitsProcessorList([EmulatedLogitsProcessor(small, tuned)]))``
    """

    def __init__(
        self,
        small: PreTrainedModel,
        tuned: Tuned,
        *,
        scale: float = 1.0,
        top_p: float | None = None,
        filter_by: FilterBy = "tuned",
        cache: bool = True,
        pad_token_id: int | None = None,
    ) -> None:
        named: dict[str, tuple[PreTrainedModel, float]]
        named = dict(tuned) if isinstance(tuned, Mapping) else {"tuned": (tuned, 1.0)}
        if not named or "small" in named:
            raise ValueError(f"tuned models need names other than 'small'; got {list(named) or 'none'}.")
        ends = small.generation_config.eos_token_id
        if pad_token_id is not None and pad_token_id in (ends if isinstance(ends, list) else [ends]):
            raise ValueError(
                f"token {pad_token_id} both pads and ends texts, so a row that begins with it may be padded or not. "
                "Leave pad_token_id out and call set_prompt_mask(attention_mask) before generate."
            )
        self.parts = SideBySide({"small": small, **{name: model for name, (model, _) in named.items()}}).eval()
        self.weights = {name: weight for name, (_, weight) in named.items()}
        self.scale, self.top_p, self.filter_by = scale, top_p, filter_by
        self.cached, self.pad_token_id = cache, pad_token_id
        self._prompt_mask: Tensor | None = None
        self.reset()

    def reset(self) -> None:
        """Forget what was read, and the prompt mask."""
        self._cache: SideBySideCache | None = None
        self._seen: Tensor | None = None  # (rows, time): what the cache holds, one id per key
        self._seen_mask: Tensor | None = None
        self._prompt_mask = None

    def set_prompt_mask(self, mask: Tensor) -> None:
        """Say which places of the coming prompts are text: ``(prompts, time)``, 0 for padding; until ``reset``."""
        self._prompt_mask = mask.long()

    @torch.no_grad()
    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        """Compose the next token's distribution.

        Args:
            input_ids: ``(rows, time)``, all tokens so far.
            scores: ``(rows, V)``, the large model's logits or log-probabilities.

        Returns:
            ``(rows, V)`` float32 log-probabilities.

        Raises:
            ValueError: the prompt mask does not fit the rows.
        """
        mask = self._mask(input_ids)
        done = self._follow(input_ids, mask) if self.cached else 0
        positions = (mask.cumsum(-1) - 1).clamp(min=0)  # of the first token that is not padding on
        logits = self.parts(
            input_ids[:, done:], mask, positions[:, done:], cache=self._cache if self.cached else None, logits_to_keep=1
        )
        self._seen, self._seen_mask = input_ids.clone(), mask
        last = {name: value[:, -1] for name, value in logits.items()}
        return emulated_log_probs(
            scores,
            last["small"],
            [(last[name], weight) for name, weight in self.weights.items()],
            scale=self.scale,
            top_p=self.top_p,
            filter_by=self.filter_by,
        )

    def _mask(self, ids: Tensor) -> Tensor:
        mask = torch.ones_like(ids)
        if self._prompt_mask is not None:
            rows, length = self._prompt_mask.shape
            if len(ids) % rows or ids.shape[1] < length:
                raise ValueError(
                    f"the prompt mask is for {rows} prompts of {length} tokens; the ids are {tuple(ids.shape)}. Call "
                    "set_prompt_mask for every batch, or reset()."
                )
            mask[:, :length] = self._prompt_mask.to(ids.device).repeat_interleave(len(ids) // rows, dim=0)
        elif self.pad_token_id is not None:
            mask = (ids != self.pad_token_id).long().cummax(-1).values
        return mask

    def _follow(self, ids: Tensor, mask: Tensor) -> int:
        """Make the cache one of ``ids``' beginning; how many tokens of it."""
        if self._cache is not None and self._seen is not None and self._seen_mask is not None:
            kept = min(self._seen.shape[1], ids.shape[1] - 1)
            taken_back = kept < self._seen.shape[1] and any(self._cache.is_sliding)  # windows have dropped their past
            rows = None if taken_back else _found(ids, mask, self._seen, self._seen_mask, kept)
            if rows is not None and kept > 0:
                if len(rows) != len(self._seen) or (rows != torch.arange(len(rows), device=rows.device)).any():
                    self._cache.batch_select_indices(rows)
                self._cache.keep(kept)
                return kept
        self._cache = self.parts.fresh_cache()
        return 0


def _found(ids: Tensor, mask: Tensor, seen: Tensor, seen_mask: Tensor, length: int) -> Tensor | None:
    """For each row the one among ``seen`` with the same beginning, its own where that is; None if one has none."""
    if seen.device != ids.device:
        return None
    same = (ids[:, None, :length] == seen[None, :, :length]) & (mask[:, None, :length] == seen_mask[None, :, :length])
    matches = same.all(-1)
    if not bool(matches.any(-1).all()):
        return None
    own = torch.arange(len(ids), device=ids.device)
    if len(ids) == len(seen):
        return torch.where(matches.diagonal(), own, matches.long().argmax(-1))
    return matches.long().argmax(-1)


def accept_drafts(
    target: Tensor, draft: Tensor, drafted: Tensor, *, generator: torch.Generator | None = None
) -> tuple[int, Tensor | None]:
    """How many drafted tokens stand, and what comes in place of the first that does not.

    Args:
        target: ``(k, V)`` log-probabilities wanted.
        draft: ``(k, V)`` log-probabilities that ``drafted`` were drawn from.
        drafted: ``(k,)``.
        generator: of the draws.

    Returns:
        The number accepted, and the token ``()`` drawn instead of the next one; None where all are accepted.
    """
    places = torch.arange(len(drafted), device=drafted.device)
    ratio = (target[places, drafted] - draft[places, drafted]).exp()
    refused = torch.rand(len(drafted), generator=generator, device=ratio.device) >= ratio
    if not bool(refused.any()):
        return len(drafted), None
    first = int(refused.long().argmax())
    residual = (target[first].exp() - draft[first].exp()).clamp(min=0)
    return first, torch.multinomial(residual, 1, generator=generator)[0]


@dataclass(frozen=True, eq=False)
class Speculated:
    """What speculative decoding gave.

    Attributes:
        input_ids: ``(1, time)``, prompt and continuation.
        drafted: tokens that the small tuned model proposed.
        accepted: of those, how many stood.
    """

    input_ids: Tensor
    drafted: int
    accepted: int

    @property
    def acceptance(self) -> float:
        """Share of the proposals that stood; NaN without any."""
        return self.accepted / self.drafted if self.drafted else float("nan")


@torch.no_grad()
def speculative_generate(
    model: EmulatedModel,
    input_ids: Tensor,
    *,
    max_new_tokens: int,
    block: int = 4,
    do_sample: bool = False,
    generator: torch.Generator | None = None,
) -> Speculated:
    """Let the small tuned model draft and the others check whole blocks: the same distribution, in fewer large steps.

    Greedy decoding gives what ``model.generate`` gives (as far as blocks and single steps round alike). Unlike
    ``generate(assistant_model=...)`` the drafting model's logits are used for the composition as well and not computed
    twice. With several tuned models the first drafts.

    Args:
        model: the composed model, in ``eval()``.
        input_ids: ``(1, time)``, on the large model's device.
        max_new_tokens: at most so many; generation ends after an end token of ``model.generation_config``.
        block: tokens drafted at once.
        do_sample: draw at temperature 1; otherwise the likeliest token.
        generator: of the draws, on the large model's device.

    Raises:
        ValueError: more than one row, no token to start from, or a block of none.
    """
    if input_ids.ndim != 2 or input_ids.shape[0] != 1 or input_ids.shape[1] == 0:
        raise ValueError(f"input_ids must be one prompt, (1, time); got {tuple(input_ids.shape)}. Call it row by row.")
    if block < 1 or max_new_tokens < 1:
        raise ValueError(f"block and max_new_tokens must be at least 1; got {block} and {max_new_tokens}.")
    drafter = next(iter(model.weights))
    others = [name for name in model.parts.models if name != drafter]

    def drafts(token: Tensor) -> Tensor:
        logits: Tensor = model.parts(token.view(1, 1), cache=cache, names=[drafter])[drafter][0, -1]
        return logits[: model.width]  # it may have ids that another part could not even read

    cache = model.parts.fresh_cache()
    if input_ids.shape[1] > 1:
        model.parts(input_ids[:, :-1], cache=cache, logits_to_keep=1)
    cache.activate_past_recording()  # after the prompt, whose past no one takes back
    end = model.generation_config.eos_token_id
    ends = {end} if isinstance(end, int) else set(end or [])
    ids, drafted, accepted = input_ids, 0, 0
    limit = input_ids.shape[1] + max_new_tokens
    while ids.shape[1] < limit:
        length = ids.shape[1]
        draft: list[Tensor] = []
        tokens: list[Tensor] = [ids[0, -1]]
        for _ in range(min(block, limit - length)):
            draft.append(drafts(tokens[-1]))
            tokens.append(_chosen(draft[-1].float().log_softmax(-1).to(ids.device), do_sample, generator))
        proposed = torch.stack(tokens[1:])
        checked = model.parts(torch.stack(tokens)[None], cache=cache, names=others)
        logits = {name: value[0] for name, value in checked.items()} | {drafter: torch.stack(draft)}
        target = model.combine({name: value[: len(proposed)] for name, value in logits.items()})
        count, instead = _verified(target, logits[drafter], proposed, do_sample, generator)
        if instead is None and length + count < limit:  # all stand: one more token comes for nothing but a small step
            after = model.combine({name: value[-1] for name, value in logits.items()} | {drafter: drafts(tokens[-1])})
            instead = _chosen(after, do_sample, generator)
        new = proposed[:count] if instead is None else torch.cat([proposed[:count], instead.view(1)])
        drafted, accepted = drafted + len(proposed), accepted + count
        stop = next((i for i, token in enumerate(new.tolist()) if token in ends), None)
        ids = torch.cat([ids, (new if stop is None else new[: stop + 1])[None]], dim=1)
        if stop is not None:
            break
        cache.keep(ids.shape[1] - 1)
    return Speculated(ids, drafted, accepted)


def _chosen(log_probs: Tensor, do_sample: bool, generator: torch.Generator | None) -> Tensor:
    if do_sample:
        return torch.multinomial(log_probs.exp(), 1, generator=generator)[0]
    return log_probs.argmax()


def _verified(
    target: Tensor, draft: Tensor, proposed: Tensor, do_sample: bool, generator: torch.Generator | None
) -> tuple[int, Tensor | None]:
    if do_sample:
        own = draft.float().log_softmax(-1).to(target.device)
        own = F.pad(own, (0, target.shape[-1] - own.shape[-1]), value=-torch.inf)
        return accept_drafts(target, own, proposed, generator=generator)
    best = target.argmax(-1)
    wrong = (best != proposed).nonzero()
    return (len(proposed), None) if not len(wrong) else (int(wrong[0]), best[wrong[0, 0]])
