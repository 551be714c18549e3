"""Classification of texts and of tokens: `SWHModel`, and a linear map of its hidden states.

A text is classified at its last token, which has read all of it; a token from the tokens before it,
since every layer is causal.
"""

from __future__ import annotations

from typing import Any, cast

import torch
from torch import Tensor, nn
from transformers.cache_utils import Cache
from transformers.modeling_outputs import SequenceClassifierOutputWithPast, TokenClassifierOutput
from transformers.utils.generic import can_return_tuple

from spectral_window.data.blocks import IGNORED
from spectral_window.errors import UserError
from spectral_window.hf.config import SWHConfig
from spectral_window.hf.inputs import check_integers, readable
from spectral_window.hf.keywords import check_keywords
from spectral_window.hf.model import SWHModel, SWHPreTrainedModel


class SWHForSequenceClassification(SWHPreTrainedModel):
    """A text classifier: tokens [B, T] -> logits [B, config.num_labels].

    The loss is that of config.problem_type.
    """

    accepts_loss_kwargs = False  # the loss is a mean over rows: Trainer averages over steps itself

    def __init__(self, config: SWHConfig):
        super().__init__(config)
        self.num_labels = cast(int, config.num_labels)
        self.model = SWHModel(config)
        self.score = nn.Linear(config.hidden_size, self.num_labels, bias=False)
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
        **kwargs: Any,
    ) -> SequenceClassifierOutputWithPast:
        """Run the model and classify each text at its last token that is not padding.

        Padding is given by attention_mask, on either side. Without a mask it is config.pad_token_id
        on the right.

        Args:
            input_ids, attention_mask, position_ids, past_key_values, inputs_embeds, use_cache: as
                in `SWHModel.forward`.
            labels: [B] classes, [B, num_labels] of 0 and 1 for several classes per text, or floats
                [B] or [B, num_labels] for regression.
            kwargs: as in `SWHModel.forward`.

        Raises:
            UserError: a bad argument (a ValueError); raised before any work.
        """
        check_keywords(kwargs, SWHForSequenceClassification.forward)
        inputs = input_ids if inputs_embeds is None else inputs_embeds
        if inputs is not None and inputs.dim() > 1:
            if not inputs.shape[1]:
                raise UserError("a text without tokens has no class (model): give at least one")
            if labels is not None:
                self._check_labels(labels, inputs.shape[0])
        outputs = self.model(
            input_ids=input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            past_key_values=past_key_values,
            inputs_embeds=inputs_embeds,
            use_cache=use_cache,
            return_dict=True,
            **kwargs,
        )
        hidden = outputs.last_hidden_state
        last = self._last(input_ids, attention_mask, hidden)
        logits = self.score(hidden[torch.arange(hidden.shape[0], device=hidden.device), last])
        loss = None
        if labels is not None:
            loss = self.loss_function(
                logits=logits, labels=labels, pooled_logits=logits, config=self.config
            )
        return SequenceClassifierOutputWithPast(
            loss=loss,
            logits=logits,
            past_key_values=outputs.past_key_values,
            hidden_states=outputs.hidden_states,
            attentions=outputs.attentions,
        )

    def _last(self, ids: Tensor | None, mask: Tensor | None, hidden: Tensor) -> Tensor:
        """Return the index of the last token of each row that is not padding: [B]."""
        length, pad = hidden.shape[1], self.config.pad_token_id
        index = torch.arange(length, device=hidden.device)
        if mask is not None:
            text = mask[:, -length:].to(hidden.device) != 0
        elif ids is not None and pad is not None:
            text = ids.to(hidden.device) != pad
        else:
            return index[-1:].expand(hidden.shape[0])
        return torch.where(text, index, 0).amax(1)

    def _check_labels(self, labels: Tensor, batch: int) -> None:
        """Raise UserError for labels that are not one class, or one set of numbers, per row."""
        shapes = {(batch,), (batch, 1), (batch, self.num_labels)}
        if tuple(labels.shape) not in shapes:
            raise UserError(
                f"labels have shape {list(labels.shape)} (model): expected {[batch]}, "
                f"or {[batch, self.num_labels]} for several classes at once"
            )
        kind = self.config.problem_type
        classes = kind == "single_label_classification" or (kind is None and self.num_labels > 1)
        if not classes or labels.is_floating_point() or not readable(labels):
            return
        _check_classes(labels, self.num_labels)


class SWHForTokenClassification(SWHPreTrainedModel):
    """A classifier of tokens: tokens [B, T] -> logits [B, T, config.num_labels].

    Every layer is causal, so a token is classified by itself and the tokens before it.

    Example:
        >>> from spectral_window.hf import SWHConfig, SWHForTokenClassification
        >>> config = SWHConfig(vocab_size=10, hidden_size=16, num_hidden_layers=1, num_labels=3)
        >>> model = SWHForTokenClassification(config).eval()
        >>> model(torch.tensor([[1, 2, 3, 4]])).logits.shape
        torch.Size([1, 4, 3])
    """

    def __init__(self, config: SWHConfig):
        super().__init__(config)
        self.num_labels = cast(int, config.num_labels)
        self.model = SWHModel(config)
        self.score = nn.Linear(config.hidden_size, self.num_labels)
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
        **kwargs: Any,
    ) -> TokenClassifierOutput:
        """Run the model and classify each token; what stands at padding has no meaning.

        Args:
            input_ids, attention_mask, position_ids, past_key_values, inputs_embeds, use_cache: as
                in `SWHModel.forward`.
            labels: [B, T] classes, 0 to num_labels - 1; -100 is ignored.
            kwargs: as in `SWHModel.forward`, and num_items_in_batch, by which the summed loss is
                divided instead of by the number of labels.

        Raises:
            UserError: a bad argument (a ValueError); raised before any work.
        """
        check_keywords(kwargs, SWHForTokenClassification.forward, "num_items_in_batch")
        items = kwargs.pop("num_items_in_batch", None)
        inputs = input_ids if inputs_embeds is None else inputs_embeds
        if labels is not None and inputs is not None:
            if labels.shape != inputs.shape[:2]:
                raise UserError(
                    f"labels have shape {list(labels.shape)} (model): expected "
                    f"{list(inputs.shape[:2])}, a class for each token"
                )
            if readable(labels):
                _check_classes(labels, self.num_labels)
        outputs = self.model(
            input_ids=input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            past_key_values=past_key_values,
            inputs_embeds=inputs_embeds,
            use_cache=use_cache,
            return_dict=True,
            **kwargs,
        )
        logits = self.score(outputs.last_hidden_state)
        loss = None
        if labels is not None:
            count = (labels != IGNORED).sum() if items is None else items
            count = torch.as_tensor(count, device=logits.device).clamp(min=1)
            loss = self.loss_function(logits, labels, self.config, num_items_in_batch=count)
        return TokenClassifierOutput(
            loss=loss,
            logits=logits,
            hidden_states=outputs.hidden_states,
            attentions=outputs.attentions,
        )


def _check_classes(labels: Tensor, classes: int) -> None:
    """Raise UserError for a label that is neither a class nor -100."""
    check_integers("labels", labels)
    if bool(((labels < 0) | (labels >= classes)).logical_and(labels != IGNORED).any()):
        raise UserError(
            f"labels are {int(labels.min())} to {int(labels.max())} (model): there are "
            f"{classes} classes, use 0 to {classes - 1} or set num_labels"
        )
