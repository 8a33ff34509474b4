"""The model's forward pass over many equal images at once.

Transformers runs attention once for each window of each image; in training all images have one size, so that the same
modules can be run on whole batches. `check` compares both.
"""

from __future__ import annotations

from typing import Any

import torch
from batches import GRID, Layout, SceneBatch
from torch import Tensor
from torch.nn import functional
from transformers import Qwen2_5_VLForConditionalGeneration, vision_utils
from transformers.models.qwen2_5_vl.modeling_qwen2_5_vl import (
    Qwen2_5_VisionTransformerPretrainedModel,
    apply_rotary_pos_emb_vision,
)


class Vision:
    """The vision tower over a batch of equal square images."""

    def __init__(self, visual: Qwen2_5_VisionTransformerPretrainedModel) -> None:
        self.visual = visual
        config: Any = visual.config
        grid = torch.tensor([[1, GRID, GRID]])
        self.order, bounds = vision_utils.get_vision_window_index(
            grid,
            spatial_merge_size=config.spatial_merge_size,
            window_size=config.window_size,
            patch_size=config.patch_size,
        )
        self.window = int(bounds[1])  # patches in a window; all windows are equal
        positions = vision_utils.get_vision_position_ids(grid, config.spatial_merge_size)
        cosine, sine = visual.rotary_pos_emb(torch.zeros(1), positions)
        self.rotary = (self._in_windows(cosine[None])[0], self._in_windows(sine[None])[0])

    def __call__(self, patches: Tensor) -> Tensor:
        """From patches [batch, 64, 1176] to image tokens [batch, 16, text hidden]."""
        weight = self.visual.patch_embed.proj.weight
        hidden: Tensor = self._in_windows(functional.linear(patches, weight.flatten(1)))
        blocks: Any = self.visual.blocks
        for index, block in enumerate(blocks):
            window = GRID * GRID if index in self.visual.fullatt_block_indexes else self.window
            hidden = hidden + self._attention(block.attn, block.norm1(hidden), window)
            hidden = hidden + block.mlp(block.norm2(hidden))
        merged = self.visual.merger(hidden.reshape(-1, hidden.shape[-1]))
        return merged.view(len(patches), len(self.order), -1)[:, self.order.argsort()]

    def _in_windows(self, patches: Tensor) -> Tensor:
        """Reorders [batch, 64, width] so that each window's patches follow each other."""
        batch, count, width = patches.shape
        groups = patches.view(batch, len(self.order), -1, width)
        return groups[:, self.order].reshape(batch, count, width)

    def _attention(self, attention: Any, hidden: Tensor, window: int) -> Tensor:
        batch, count, width = hidden.shape
        split = attention.qkv(hidden).view(batch, count, 3, attention.num_heads, -1)
        query, key, value = split.unbind(2)
        query, key = apply_rotary_pos_emb_vision(query, key, *self.rotary)
        query, key, value = (part.reshape(-1, window, *part.shape[2:]).transpose(1, 2) for part in (query, key, value))
        found = functional.scaled_dot_product_attention(query, key, value, scale=attention.scaling)
        return attention.proj(found.transpose(1, 2).reshape(batch, count, width))


class Network:
    """The whole model over scenes and over running text."""

    def __init__(self, model: Qwen2_5_VLForConditionalGeneration, layout: Layout) -> None:
        self.model = model
        self.vision = Vision(model.model.visual)
        self.layout = layout
        self.width = model.model.language_model.embed_tokens.embedding_dim
        self.mask = layout.mask()
        self.positions = layout.positions()

    def hidden(self, batch: SceneBatch) -> tuple[Tensor, Tensor]:
        """Every question token in the middle of the decoder and behind it, each [scenes, questions, SEGMENT, hidden]."""
        decoder = self.model.model.language_model
        count = len(batch.patches)
        image = self.vision(batch.patches)
        before = torch.tensor(self.layout.before).expand(count, -1)
        after = torch.tensor(self.layout.after).expand(count, -1)
        embedded = [
            decoder.embed_tokens(before),
            image.float(),
            decoder.embed_tokens(torch.cat([after, batch.tokens.flatten(1)], dim=1)),
        ]
        found = decoder(
            inputs_embeds=torch.cat(embedded, dim=1),
            attention_mask={"full_attention": self.mask},
            position_ids=self.positions.expand(-1, count, -1),
            use_cache=False,
            output_hidden_states=True,
        )
        states = (found.hidden_states[len(decoder.layers) // 2], found.last_hidden_state)
        middle, last = (state[:, self.layout.prefix :].reshape(*batch.tokens.shape, -1) for state in states)
        return middle, last

    def text(self, tokens: Tensor) -> Tensor:
        """Logits of running text, [rows, length, vocabulary]."""
        decoder = self.model.model.language_model
        hidden = decoder(input_ids=tokens, attention_mask={"full_attention": None}, use_cache=False).last_hidden_state
        return self.model.lm_head(hidden)


@torch.no_grad()
def check(network: Network, batch: SceneBatch, prompt: list[int], answer: int) -> None:
    """Raises AssertionError where `network` and the model's own forward differ on a scene's last question.

    `prompt` is the whole prompt with the image's tokens, as the processor makes it; `answer` the place in the segment
    that predicts the first token of the answer.
    """
    model = network.model
    own = model(
        input_ids=torch.tensor([prompt]),
        pixel_values=batch.patches[0],
        image_grid_thw=torch.tensor([[1, GRID, GRID]]),
        mm_token_type_ids=torch.tensor([[int(token == model.config.image_token_id) for token in prompt]]),
    ).logits[0, -1]
    ours = model.lm_head(network.hidden(batch)[1][0, -1, answer])
    torch.testing.assert_close(ours, own, atol=1e-4, rtol=1e-4)
