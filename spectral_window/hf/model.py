"""The models, as transformers expects them: embedding, pre-norm blocks, final norm, head.

    x = embed(tokens)
    for each block:  x = x + mixer(norm(x));  x = x + mlp(norm(x))
    logits = head(norm(x))

Only the mixer uses other tokens; all other parts work on each token separately. So padding, packed
documents and continuing from a cache are two arguments of the mixer, `documents` and `state`, and a
block is a pure function of them. `inputs.py` computes the first from the caller's arguments, once
for all layers; `cache.py` stores the second.

Without gradients a long text passes through all layers in segments, each from the states after the
one before. So the activations take the memory of one segment, whatever the length, and stay in the
processor's cache.
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
from transformers.utils.generic import can_return_tuple, merge_with_config_defaults
from transformers.utils.output_capturing import capture_outputs

from spectral_window.data.blocks import IGNORED
from spectral_window.errors import UserError, UserTypeError
from spectral_window.hf.cache import SWHCacheLayer, open_cache
from spectral_window.hf.config import SWHConfig
from spectral_window.hf.inputs import (
    as_indices,
    check_count_kept,
    check_ids,
    check_integers,
    next_start,
    readable,
    resolve_documents,
    span_documents,
)
from spectral_window.hf.keywords import check_keywords, check_wishes, read_documents
from spectral_window.hf.saving import SavedModel
from spectral_window.nn.fusions import Fusion
from spectral_window.nn.kernels import Kernel
from spectral_window.nn.layers import MLPS, RMSNorm, no_weight_decay, project
from spectral_window.nn.mixers import MIXERS, Mixer
from spectral_window.ops.context_parallel import ContextParallel
from spectral_window.ops.documents import Documents
from spectral_window.ops.tracing import is_recorded

Part = TypeVar("Part", bound=nn.Module)
SEGMENT = 1024  # tokens of a row that go through all layers at once, where no gradient is wanted


class SWHLayer(GradientCheckpointingLayer):
    """One block: (x [B, T, D], documents, state) -> (x, state).

    A pure function, so gradient checkpointing can recompute it.
    """

    def __init__(self, config: SWHConfig, number: int = 0):
        super().__init__()
        self.config = config
        size, eps = config.hidden_size, config.rms_norm_eps
        self.mixer_norm = RMSNorm(size, eps)
        fields = config.recorded()
        self.mixer: Mixer = MIXERS.make(
            fields, config.mixer, hidden_size=size, num_heads=config.num_attention_heads, eps=eps,
            layer=number,
        )  # fmt: skip
        self.mlp_norm = RMSNorm(size, eps)
        self.mlp = MLPS.make(fields, config.mlp, size, cast(int, config.intermediate_size))

    def forward(
        self, x: Tensor, documents: Documents | None = None, state: Any = None
    ) -> tuple[Tensor, Any]:
        mixed, state = self.mixer(self.mixer_norm(x), documents, state)
        x = x + mixed
        return x + self.mlp(self.mlp_norm(x)), state

    def next_state(self, x: Tensor, documents: Documents | None, state: Any) -> Any:
        """Return the state after x, without computing the output."""
        return self.mixer(self.mixer_norm(x), documents, state)[1]


class SWHPreTrainedModel(SavedModel):
    """Base class of the models: initialisation of weights, and the cost of a model."""

    config_class = SWHConfig
    config: SWHConfig
    base_model_prefix = "model"
    main_input_name = "input_ids"
    supports_gradient_checkpointing = True
    _no_split_modules = ["SWHLayer"]  # noqa: RUF012
    _skip_keys_device_placement = ["past_key_values"]  # noqa: RUF012
    _supports_sdpa = True
    _can_record_outputs = {"hidden_states": SWHLayer}  # noqa: RUF012

    def __init__(self, config: SWHConfig, *args: Any, **kwargs: Any):
        if not isinstance(config, SWHConfig):
            raise UserTypeError(f"config is a {type(config).__name__} (model): pass an SWHConfig")
        config.validate()  # a field may have been set since the config was made
        super().__init__(config, *args, **kwargs)

    def post_init(self) -> None:
        """Finish a constructor, as transformers does; kernels stay float32 whatever the dtype."""
        kernels = [name for name, part in self.named_modules() if isinstance(part, Kernel)]
        self._keep_in_fp32_modules_strict = {name.rpartition(".")[2] for name in kernels}
        super().post_init()

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

    def count_parameters(self, embeddings: bool = True) -> int:
        """Return the number of parameters; tied ones count once.

        Args:
            embeddings: count the embedding and the head too.
        """
        tables = [self.get_input_embeddings(), self.get_output_embeddings()]
        left_out = set() if embeddings else {id(t.weight) for t in tables if t is not None}
        return sum(p.numel() for p in self.parameters() if id(p) not in left_out)

    @property
    def constant_state(self) -> bool:
        """Whether the state has the same size after any number of tokens."""
        return all(mixer.constant_state for mixer in self._parts(Mixer))

    @property
    def segment(self) -> int:
        """Tokens of a prompt to read at once. A state that grows is copied whole by each segment,
        so there they are longer."""
        return SEGMENT if self.constant_state else 4 * SEGMENT

    def state_bytes(self, context: int, batch_size: int = 1) -> int:
        """Return the bytes of the cache after `context` tokens, in the model's dtype."""
        return sum(
            mixer.state_bytes(context, batch_size=batch_size, dtype=self.dtype)
            for mixer in self._parts(Mixer)
        )

    def flops_per_token(self, context: int) -> int:
        """Return the floating-point operations of a forward pass per token.

        Averaged over `context` tokens. A multiply-add counts as 2, an embedding lookup as 0.
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
    """The model without a head: tokens [B, T] -> hidden states [B, T, D]."""

    def __init__(self, config: SWHConfig):
        super().__init__(config)
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(SWHLayer(config, n) for n in range(config.num_hidden_layers))
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
        context_parallel: ContextParallel | None = None,
        **kwargs: Any,
    ) -> BaseModelOutputWithPast:
        """Run the blocks.

        Args:
            input_ids: [B, T] integers below vocab_size; T and B may be 0.
            attention_mask: [B, past + T], 1 for text and 0 for padding, anywhere in a row; the
                output of a row of padding only is finite.
            position_ids: [B, T], restarting at 0 where the next packed document starts.
            past_key_values: the cache of an earlier call with the same rows; changed in place.
            inputs_embeds: [B, T, D], instead of input_ids.
            use_cache: return a cache (default: config.use_cache).
            keep_last: return only the hidden states of the last n positions; 0 for all.
            context_parallel: the processes that share these rows. Each passes the same arguments,
                and gets the hidden states of its own span and the cache at the end of it.
            kwargs: documents can also be given by seq_idx, document_ids or cu_seq_lens_q (see
                `keywords.py`).

        Raises:
            UserError: a bad or unknown argument (a ValueError); raised before any work.
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
        here = slice(segment)
        if context_parallel is not None:
            here, segment = self._own_span(context_parallel, tokens), None
        x, slots = self._embed(tokens[:, here]), None
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
        if context_parallel is not None:
            documents = span_documents(documents, context_parallel, tokens, seen)
            start = documents.start
            for slot in slots or ():
                slot.seen = here.start
        outputs: list[Tensor] = []
        # (a range over the length would fix the length of an exported graph)
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
            outputs.append(x)
            if keep_last:
                while len(outputs) > 1 and sum(x.shape[1] for x in outputs[1:]) >= keep_last:
                    outputs.pop(0)
        x = outputs[0] if len(outputs) == 1 else torch.cat(outputs, 1)
        return BaseModelOutputWithPast(
            last_hidden_state=self.norm(x[:, -keep_last:]), past_key_values=past_key_values
        )

    def _embed(self, tokens: Tensor) -> Tensor:
        """Return embeddings [B, T, D] of token ids [B, T], or of embeddings, which stay."""
        return tokens if tokens.dim() == 3 else self.embed_tokens(tokens)

    def _own_span(self, context: ContextParallel, tokens: Tensor) -> slice:
        """Return the columns of this process, after checking that rows can be shared."""
        for mixer in self._parts(Mixer):
            mixer.check_in_spans()
        if is_recorded():
            raise UserError(
                "context_parallel in a recorded graph (model): leave torch.compile or export out"
            )
        return context.span(tokens.shape[1])

    def _running_layers(self) -> list[SWHLayer]:
        """Return the first config.num_hidden_layers; assisted decoding lowers that number."""
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
            or bool(hidden_states)  # they are collected layer by layer
            or not self.constant_state
        )
        return None if whole else SEGMENT


class SWHForCausalLM(SWHPreTrainedModel, GenerationMixin):
    """A language model: `SWHModel`, logits [B, T, vocab_size], and the loss of the next token.

    Example:
        >>> from spectral_window import SWHConfig, SWHForCausalLM
        >>> config = SWHConfig(
        ...     vocab_size=10, hidden_size=16, num_hidden_layers=2, num_attention_heads=2
        ... )
        >>> model = SWHForCausalLM(config).eval()
        >>> model(torch.tensor([[1, 2, 3]])).logits.shape
        torch.Size([1, 3, 10])
        >>> model.generate(torch.tensor([[1, 2, 3]]), max_new_tokens=4, pad_token_id=0).shape
        torch.Size([1, 7])
    """

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
        """Run the model, and compute logits and the loss.

        The loss is in nats per token, computed in float32. If no token is scored it is 0, with a
        warning.

        Args:
            input_ids, attention_mask, position_ids, past_key_values, inputs_embeds, use_cache: as
                in `SWHModel.forward`.
            labels: [B, T], the input tokens, which are shifted here; -100 is ignored.
            logits_to_keep: 0 for all logits, n for the last n, or a 1-D tensor of indices; only
                without labels.
            kwargs: as in `SWHModel.forward`, and two that must not be in the signature, since
                Trainer takes parameters named after labels as columns of the data set:
                shift_labels [B, T], labels that are shifted already, the token after each input
                token; num_items_in_batch, by which the summed loss is divided instead of by the
                number of tokens. With context_parallel the logits are those of this process's
                span, and the losses of the processes add up to that of the rows.

        Raises:
            UserError: a bad or unknown argument (a ValueError); raised before any work.
        """
        accepted = ("shift_labels", "num_items_in_batch", "context_parallel")
        check_keywords(kwargs, SWHForCausalLM.forward, *accepted)
        shift_labels = kwargs.pop("shift_labels", None)
        items = kwargs.pop("num_items_in_batch", None)
        if isinstance(logits_to_keep, Tensor):
            check_integers("logits_to_keep", logits_to_keep)
        else:
            check_count_kept("logits_to_keep", logits_to_keep)
        scored = labels if shift_labels is None else shift_labels
        if scored is not None:
            scored = as_indices(scored)
            inputs = inputs_embeds if input_ids is None else input_ids
            shape = None if inputs is None else tuple(inputs.shape[:2])
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
        context = kwargs.get("context_parallel")
        return CausalLMOutputWithPast(
            loss=None
            if scored is None
            else self._loss(
                logits,
                scored,
                items,
                shifted=shift_labels is not None,
                here=slice(None) if context is None else context.span(scored.shape[1]),
            ),
            logits=logits,
            past_key_values=outputs.past_key_values,
            hidden_states=outputs.hidden_states,
            attentions=outputs.attentions,
        )

    def _loss(
        self, logits: Tensor, labels: Tensor, items: Any, *, shifted: bool, here: slice
    ) -> Tensor:
        """Return transformers' loss; it is divided by at least 1, so never NaN.

        Args:
            logits: [B, n, vocab_size], of the columns `here`.
            labels: [B, T], of whole rows.
            items: the number to divide by, or None for that of the labels.
            shifted: whether the labels are shifted already.
            here: columns of the labels.
        """
        labels = labels.to(torch.int64)
        if not shifted:
            labels = nn.functional.pad(labels, (0, 1), value=IGNORED)[:, 1:]
        count = (labels != IGNORED).sum()
        if labels.is_cpu and readable(labels) and count == 0:
            warnings.warn("all labels are -100, no token is scored: the loss is 0", stacklevel=3)
        items = torch.as_tensor(count if items is None else items, device=logits.device)
        return self.loss_function(
            logits=logits,
            labels=None,
            vocab_size=self.config.vocab_size,
            num_items_in_batch=items.clamp(min=1),
            shift_labels=labels[:, here].contiguous(),
        )

    def compile_loss(self) -> None:
        """Compile the loss: it then reads the logits once, and never holds them in float32."""
        self._loss = torch.compile(self._loss)  # type: ignore[method-assign]

    def generate(self, *args: Any, **kwargs: Any) -> Any:
        """Call transformers' `generate`.

        Early exit changes the config's number of layers; it is restored even after an exception.
        """
        layers = self.config.num_hidden_layers
        try:
            return super().generate(*args, **kwargs)  # type: ignore[misc]
        finally:
            self.config.num_hidden_layers = layers

    def init_continuous_batching(self, *args: Any, **kwargs: Any) -> Any:
        """Not supported: transformers' continuous batching needs pages of keys and values."""
        raise NotImplementedError(
            f"{type(self).__name__} has no pages of keys and values (continuous batching): "
            "use generate() with a left-padded batch"
        )

    def generate_batch(self, *args: Any, **kwargs: Any) -> Any:
        """Not supported: see `init_continuous_batching`."""
        return self.init_continuous_batching()


def parameters_without_decay(model: nn.Module) -> set[str]:
    """Return the names of the parameters without weight decay in all SWH models inside `model`.

    `model` may be a wrapper: an adapter, a compiled model.
    """
    names: set[str] = set()
    for prefix, part in model.named_modules():
        if isinstance(part, SWHPreTrainedModel):
            names |= {f"{prefix}.{name}" if prefix else name for name in no_weight_decay(part)}
    return names


def count_parameters(config: SWHConfig) -> int:
    """Return the number of parameters of a model of this config, without allocating it.

    All layers have equally many.
    """

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
    """Return a copy of `config` with the intermediate_size for about `target` parameters.

    It serves to compare two mixers at equal size.

    Raises:
        UserError: the nearest number of parameters differs from `target` by more than 1 %.
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
