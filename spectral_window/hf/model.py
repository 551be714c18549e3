"""The model in transformers' clothes: embedding, pre-norm blocks, final norm, head.

    x = embed(tokens)
    for each block:  x = x + mixer(norm(x));  x = x + mlp(norm(x))
    logits = head(norm(x))

Everything that sees other tokens is in the mixer; everything else works token by token. So
padding, packed documents and continuing from a cache concern only two arguments of the mixer,
`documents` and `state`, and a block is a pure function of them. `inputs.py` makes the first from
what callers pass, once for all layers; `cache.py` keeps the second.

Without gradients, a long text goes through all layers in segments, each from the states that the
one before left: the memory of the activations is that of one segment, whatever the length, and they
stay in the processor's cache.
"""

from __future__ import annotations

import copy
import warnings
from typing import Any, TypeVar, cast

import torch
from torch import Tensor, nn
from transformers import initialization as init
from transformers.cache_utils import Cache, DynamicCache
from transformers.generation import GenerationMixin
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.modeling_outputs import BaseModelOutputWithPast, CausalLMOutputWithPast
from transformers.modeling_utils import PreTrainedModel
from transformers.utils.generic import can_return_tuple, merge_with_config_defaults
from transformers.utils.output_capturing import capture_outputs

from spectral_window.data.blocks import IGNORED
from spectral_window.errors import UserError, UserTypeError
from spectral_window.hf.cache import SWHCacheLayer, open_cache
from spectral_window.hf.config import SWHConfig, code_stays_here
from spectral_window.hf.inputs import (
    as_indices,
    check_count_kept,
    check_ids,
    check_integers,
    next_start,
    readable,
    resolve_documents,
)
from spectral_window.hf.keywords import check_keywords, check_wishes, read_documents
from spectral_window.nn.fusions import Fusion
from spectral_window.nn.kernels import Kernel
from spectral_window.nn.layers import MLPS, RMSNorm, no_weight_decay, project
from spectral_window.nn.mixers import MIXERS, Mixer
from spectral_window.ops.documents import Documents

Part = TypeVar("Part", bound=nn.Module)
SEGMENT = 1024  # tokens of a row that go through all layers at once, where no gradient is wanted


class SWHLayer(GradientCheckpointingLayer):
    """One block: (x [B, T, D], documents, state) -> (x, state); pure, so it may be recomputed."""

    def __init__(self, config: SWHConfig):
        super().__init__()
        self.config = config
        size, eps = config.hidden_size, config.rms_norm_eps
        self.mixer_norm = RMSNorm(size, eps)
        fields = config.recorded()
        self.mixer: Mixer = MIXERS.make(
            fields, config.mixer, hidden_size=size, num_heads=config.num_attention_heads, eps=eps
        )
        self.mlp_norm = RMSNorm(size, eps)
        self.mlp = MLPS.make(fields, config.mlp, size, cast(int, config.intermediate_size))

    def forward(
        self, x: Tensor, documents: Documents | None = None, state: Any = None
    ) -> tuple[Tensor, Any]:
        mixed, state = self.mixer(self.mixer_norm(x), documents, state)
        x = x + mixed
        return x + self.mlp(self.mlp_norm(x)), state

    def next_state(self, x: Tensor, documents: Documents | None, state: Any) -> Any:
        """The state after x, without the output."""
        return self.mixer(self.mixer_norm(x), documents, state)[1]


class SWHPreTrainedModel(PreTrainedModel):
    """What the models share: how weights begin, and what the model costs."""

    config_class = SWHConfig
    config: SWHConfig
    base_model_prefix = "model"
    main_input_name = "input_ids"
    supports_gradient_checkpointing = True
    _no_split_modules = ["SWHLayer"]  # noqa: RUF012
    _skip_keys_device_placement = ["past_key_values"]  # noqa: RUF012
    _keep_in_fp32_modules_strict = ["kernel", "memory"]  # noqa: RUF012 (whatever the dtype)
    _supports_sdpa = True
    _can_record_outputs = {"hidden_states": SWHLayer}  # noqa: RUF012

    def __init__(self, config: SWHConfig, *args: Any, **kwargs: Any):
        if not isinstance(config, SWHConfig):
            raise UserTypeError(f"config is a {type(config).__name__} (model): pass an SWHConfig")
        config.validate()  # a field may have been set since the config was made
        super().__init__(config, *args, **kwargs)

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        std = self.config.initializer_range
        if isinstance(module, (nn.Linear, nn.Embedding)) and std is not None:
            init.normal_(module.weight, mean=0.0, std=std)
            if isinstance(module, nn.Linear) and module.bias is not None:
                init.zeros_(module.bias)
        elif isinstance(module, (nn.Linear, nn.Embedding, Kernel, Fusion)):
            module.reset_parameters()
        elif isinstance(module, RMSNorm):
            init.ones_(module.weight)

    @classmethod
    def register_for_auto_class(cls, auto_class: Any = "AutoModel") -> None:
        """Refused: the file that it copies into a model's folder cannot be loaded by itself."""
        raise code_stays_here(cls)

    def count_parameters(self, embeddings: bool = True) -> int:
        """Parameters, tied ones once; without `embeddings`, embedding and head are left out."""
        tables = [self.get_input_embeddings(), self.get_output_embeddings()]
        left_out = set() if embeddings else {id(t.weight) for t in tables if t is not None}
        return sum(p.numel() for p in self.parameters() if id(p) not in left_out)

    def state_bytes(self, context: int, batch_size: int = 1) -> int:
        """Bytes of the cache after `context` tokens of `batch_size` rows, in the model's dtype."""
        return sum(
            mixer.state_bytes(context, batch_size=batch_size, dtype=self.dtype)
            for mixer in self._parts(Mixer)
        )

    def flops_per_token(self, context: int) -> int:
        """Floating-point operations of a forward, a token, averaged over `context` tokens.

        A multiply-add is 2; looking up the embedding is none.
        """
        dense = [layer.mlp for layer in self._parts(SWHLayer)]
        matrices = [p for part in dense for p in part.parameters() if p.dim() == 2]
        head = self.get_output_embeddings()
        if head is not None:
            matrices.append(head.weight)
        return 2 * sum(p.numel() for p in matrices) + sum(
            mixer.flops_per_token(context) for mixer in self._parts(Mixer)
        )

    def _parts(self, kind: type[Part]) -> list[Part]:
        return [module for module in self.modules() if isinstance(module, kind)]


class SWHModel(SWHPreTrainedModel):
    """Tokens [B, T] -> hidden states [B, T, D]."""

    def __init__(self, config: SWHConfig):
        super().__init__(config)
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(SWHLayer(config) for _ in range(config.num_hidden_layers))
        self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.gradient_checkpointing = False
        self.post_init()

    @merge_with_config_defaults
    @capture_outputs
    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: Tensor | None = None,
        use_cache: bool | None = None,
        keep_last: int = 0,
        **kwargs: Any,
    ) -> BaseModelOutputWithPast:
        """Run the blocks.

        input_ids:       [B, T] integers below vocab_size, or inputs_embeds [B, T, D]; T and B may
                         be 0.
        attention_mask:  [B, past + T], 1 for text and 0 for padding, anywhere; a row of padding
                         alone stays finite.
        position_ids:    [B, T], restarting at 0 where the next packed document begins.
        past_key_values: the cache of an earlier call with the same rows; it is changed in place.
        use_cache:       return a cache (default: config.use_cache).
        keep_last:       return the hidden states of the last n positions alone; 0 for all.
        Documents may also be told by seq_idx, document_ids or cu_seq_lens_q (see `keywords.py`).

        Raises ValueError for anything else, before any work.
        """
        check_keywords(kwargs, SWHModel.forward)
        check_count_kept("keep_last", keep_last)
        if (input_ids is None) == (inputs_embeds is None):
            raise UserError("pass either input_ids or inputs_embeds (model), one of them")
        tokens = cast(Tensor, inputs_embeds if input_ids is None else input_ids)
        if input_ids is not None:
            tokens = as_indices(tokens)
            check_ids(tokens, self.config.vocab_size)
        elif tokens.dim() != 3 or tokens.shape[2] != self.config.hidden_size:
            raise UserError(
                f"inputs_embeds have shape {list(tokens.shape)} (model): "
                f"expected [batch, time, {self.config.hidden_size}]"
            )
        layers = self._running_layers()
        length, segment = tokens.shape[1], self._segment(tokens, kwargs)
        x, slots = self._embed(tokens[:, :segment]), None
        if use_cache and past_key_values is None:
            past_key_values = DynamicCache(config=self.config)
        if past_key_values is not None:
            slots = open_cache(past_key_values, self.config, x)
        elif segment is not None:
            slots = [SWHCacheLayer() for _ in layers]

        start, seen = (slots[0].start, slots[0].seen) if slots else (None, 0)
        check_wishes({"output_attentions": self.config.output_attentions, **kwargs}, tokens, seen)
        documents = resolve_documents(
            attention_mask,
            position_ids,
            tokens=tokens,
            past=seen,
            start=start,
            numbers=read_documents(kwargs, tokens, seen),
        )
        kept: list[Tensor] = []
        # (a range over a length that only the exported graph knows would fix it)
        for begin in (0,) if segment is None else range(0, length, segment):
            part = slice(begin, None if segment is None else begin + segment)
            if begin:
                x = self._embed(tokens[:, part])
            at = None if documents is None else documents.columns(part)
            start = next_start(at, start, seen + begin, x.shape[1])
            for index, layer in enumerate(layers):
                if slots is None:
                    x, _ = layer(x, at)
                else:
                    x = slots[index].advance(layer, x, at, start)
            kept.append(x)
            if keep_last:
                while len(kept) > 1 and sum(x.shape[1] for x in kept[1:]) >= keep_last:
                    kept.pop(0)
        x = kept[0] if len(kept) == 1 else torch.cat(kept, 1)
        return BaseModelOutputWithPast(
            last_hidden_state=self.norm(x[:, -keep_last:]), past_key_values=past_key_values
        )

    def _embed(self, tokens: Tensor) -> Tensor:
        """Token ids [B, T], or what is embedded already [B, T, D]: [B, T, D]."""
        return tokens if tokens.dim() == 3 else self.embed_tokens(tokens)

    def _running_layers(self) -> list[SWHLayer]:
        """The first config.num_hidden_layers: assisted decoding asks for a few by setting it."""
        count, built = self.config.num_hidden_layers, len(self.layers)
        if not 1 <= count <= built:
            raise UserError(
                f"num_hidden_layers is {count} (config): the model has {built}, use 1 to {built}"
            )
        return [cast(SWHLayer, layer) for layer in self.layers[:count]]

    def _segment(self, tokens: Tensor, wishes: dict[str, Any]) -> int | None:
        """How many tokens of a row go through all layers at once (see the module's docstring);
        None for all."""
        length = tokens.shape[1]
        hidden_states = wishes.get("output_hidden_states", self.config.output_hidden_states)
        whole = (
            torch.compiler.is_compiling()
            or length <= SEGMENT
            or torch.is_grad_enabled()
            or bool(hidden_states)  # they are collected a layer at a time
            or not all(cast(SWHLayer, layer).mixer.constant_state for layer in self.layers)
        )
        return None if whole else SEGMENT


class SWHForCausalLM(SWHPreTrainedModel, GenerationMixin):
    """A language model: `SWHModel`, logits [B, T, vocab_size], and the loss of the next token."""

    _tied_weights_keys = {"lm_head.weight": "model.embed_tokens.weight"}  # noqa: RUF012

    def __init__(self, config: SWHConfig):
        super().__init__(config)
        self.model = SWHModel(config)
        self.vocab_size = config.vocab_size
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.post_init()

    @can_return_tuple
    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int | Tensor = 0,
        **kwargs: Any,
    ) -> CausalLMOutputWithPast:
        """`SWHModel.forward`, then logits and loss.

        labels:         [B, T], the input tokens again, shifted here; -100 is ignored.
        logits_to_keep: 0 for all logits, n for the last n, or a 1-D tensor of indices; only without
                        labels.
        In kwargs, since Trainer takes every parameter named after labels for one of the data set's:
        shift_labels:       [B, T], already shifted: the token that follows each input token.
        num_items_in_batch: the loss is the sum over tokens divided by this, else by their number.

        The loss is in nats a token, computed in float32; where no token is scored it is 0, with a
        warning.
        """
        check_keywords(kwargs, SWHForCausalLM.forward, "shift_labels", "num_items_in_batch")
        shift_labels = kwargs.pop("shift_labels", None)
        items = kwargs.pop("num_items_in_batch", None)
        if isinstance(logits_to_keep, Tensor):
            check_integers("logits_to_keep", logits_to_keep)
        else:
            check_count_kept("logits_to_keep", logits_to_keep)
        scored = labels if shift_labels is None else shift_labels
        if scored is not None:
            scored = as_indices(scored)
            given = inputs_embeds if input_ids is None else input_ids
            shape = None if given is None else tuple(given.shape[:2])
            name = "labels" if shift_labels is None else "shift_labels"
            check_ids(scored, self.config.vocab_size, name, shape)
            if isinstance(logits_to_keep, Tensor) or logits_to_keep:
                raise UserError(
                    "labels and logits_to_keep (model): the loss needs all logits, pass one of them"
                )
        outputs = self.model(
            input_ids=input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            past_key_values=past_key_values,
            inputs_embeds=inputs_embeds,
            use_cache=use_cache,
            keep_last=0 if isinstance(logits_to_keep, Tensor) else logits_to_keep,
            return_dict=True,
            **kwargs,
        )
        hidden = outputs.last_hidden_state
        if isinstance(logits_to_keep, Tensor):
            hidden = hidden[:, logits_to_keep]
        (logits,) = project(hidden, self.lm_head)
        return CausalLMOutputWithPast(
            loss=None
            if scored is None
            else self._loss(logits, scored, items, shifted=shift_labels is not None),
            logits=logits,
            past_key_values=outputs.past_key_values,
            hidden_states=outputs.hidden_states,
            attentions=outputs.attentions,
        )

    def _loss(self, logits: Tensor, labels: Tensor, items: Any, *, shifted: bool) -> Tensor:
        """transformers' loss, divided by a count that is never 0: no mean over nothing, no NaN."""
        labels = labels.to(torch.int64)
        if not shifted:
            labels = nn.functional.pad(labels, (0, 1), value=IGNORED)[:, 1:]
        labels = labels.contiguous()
        count = (labels != IGNORED).sum()
        if labels.is_cpu and readable(labels) and count == 0:
            warnings.warn("all labels are -100, no token is scored: the loss is 0", stacklevel=3)
        items = torch.as_tensor(count if items is None else items, device=logits.device)
        return self.loss_function(
            logits=logits,
            labels=None,
            vocab_size=self.config.vocab_size,
            num_items_in_batch=items.clamp(min=1),
            shift_labels=labels,
        )

    def generate(self, *args: Any, **kwargs: Any) -> Any:
        """transformers' `generate`. Early exit sets the config's number of layers for a while: it
        is set back whatever happens."""
        layers = self.config.num_hidden_layers
        try:
            return super().generate(*args, **kwargs)  # type: ignore[misc]
        finally:
            self.config.num_hidden_layers = layers

    def init_continuous_batching(self, *args: Any, **kwargs: Any) -> Any:
        """Refused, and with it all of transformers' continuous batching, which begins here."""
        raise NotImplementedError(
            f"{type(self).__name__} has no pages of keys and values (continuous batching): "
            "use generate() with a left-padded batch"
        )

    def generate_batch(self, *args: Any, **kwargs: Any) -> Any:
        """Refused: see `init_continuous_batching`."""
        return self.init_continuous_batching()


def parameters_without_decay(model: nn.Module) -> set[str]:
    """Names of the parameters that weight decay must leave alone in every SWH model inside `model`
    (which may wrap it: an adapter, a compiled model)."""
    names: set[str] = set()
    for prefix, part in model.named_modules():
        if isinstance(part, SWHPreTrainedModel):
            names |= {f"{prefix}.{name}" if prefix else name for name in no_weight_decay(part)}
    return names


def count_parameters(config: SWHConfig) -> int:
    """Parameters of a model of this config, without allocating one: layers are all alike."""

    def of(layers: int) -> int:
        changed = copy.deepcopy(config)
        changed.num_hidden_layers = layers
        with torch.device("meta"):
            model = SWHForCausalLM(changed)
        model.tie_weights()
        return model.count_parameters()

    one = of(1)
    return one + (config.num_hidden_layers - 1) * (of(2) - one)


def match_parameters(config: SWHConfig, target: int) -> SWHConfig:
    """A copy of `config` whose intermediate_size brings its parameters nearest to `target`.

    So two mixers can be compared at equal size. Raises `UserError` where 1 % cannot be met.
    """

    def with_width(width: int) -> SWHConfig:
        changed = copy.deepcopy(config)
        changed.intermediate_size = width
        return changed

    base = count_parameters(with_width(1))
    step = count_parameters(with_width(2)) - base
    width = max(1, 1 + round((target - base) / step))
    reached = base + (width - 1) * step
    if abs(reached - target) > 0.01 * target:
        raise UserError(
            f"{target} parameters cannot be met (match_parameters): there are {reached} with "
            f"intermediate_size {width}; change hidden_size or num_hidden_layers"
        )
    return with_width(width)
