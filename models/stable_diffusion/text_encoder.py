"""The text encoder of Stable Diffusion v1: that of CLIP ViT-L/14, without its projection.

CLIP: Radford et al., 2021, https://arxiv.org/abs/2103.00020. The modules have the names that give
the keys of the published file without their prefix `cond_stage_model.transformer.`. That file may
also hold `text_model.embeddings.position_ids`, the numbers 0 … 76, which are not needed here.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from models.network import Network


class Embeddings(nn.Module):
    """A row of numbers for each token of the vocabulary, and one for each position."""

    def __init__(self, vocabulary: int, width: int, length: int) -> None:
        super().__init__()
        self.token_embedding = nn.Embedding(vocabulary, width)
        self.position_embedding = nn.Embedding(length, width)

    def forward(self, embeddings: Tensor) -> Tensor:
        """Add the positions: (batch, length, width) → the same shape."""
        length = embeddings.shape[1]
        if length > self.position_embedding.num_embeddings:
            raise ValueError(
                f"{length} tokens are too many: there are "
                f"{self.position_embedding.num_embeddings} positions"
            )
        return embeddings + self.position_embedding.weight[:length]


class CausalAttention(nn.Module):
    """Attention of every token to itself and to those before it."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.q_proj = nn.Linear(width, width)
        self.k_proj = nn.Linear(width, width)
        self.v_proj = nn.Linear(width, width)
        self.out_proj = nn.Linear(width, width)

    def _split(self, rows: Tensor) -> Tensor:
        """(batch, length, width) → (batch, heads, length, width per head)."""
        return rows.unflatten(2, (self.heads, -1)).transpose(1, 2)

    def forward(self, x: Tensor) -> Tensor:
        """(batch, length, width) → the same shape."""
        q = self._split(self.q_proj(x))
        k = self._split(self.k_proj(x))
        v = self._split(self.v_proj(x))
        attended = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        attended = attended.transpose(1, 2).flatten(2)  # (batch, length, width)
        return self.out_proj(attended)


class FeedForward(nn.Module):
    """Two linear layers with QuickGELU, x · sigmoid(1.702 x), between them."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.fc1 = nn.Linear(width, 4 * width)
        self.fc2 = nn.Linear(4 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        """(batch, length, width) → the same shape."""
        h = self.fc1(x)
        h = h * torch.sigmoid(1.702 * h)
        return self.fc2(h)


class Layer(nn.Module):
    """Attention and a feed-forward layer. Both normalise their input first and are residual."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.self_attn = CausalAttention(width, heads)
        self.layer_norm1 = nn.LayerNorm(width)
        self.mlp = FeedForward(width)
        self.layer_norm2 = nn.LayerNorm(width)

    def forward(self, x: Tensor) -> Tensor:
        """(batch, length, width) → the same shape."""
        x = x + self.self_attn(self.layer_norm1(x))
        return x + self.mlp(self.layer_norm2(x))


class Encoder(nn.Module):
    """The layers, one after the other."""

    def __init__(self, width: int, layers: int, heads: int) -> None:
        super().__init__()
        self.layers = nn.ModuleList([Layer(width, heads) for _ in range(layers)])

    def forward(self, x: Tensor) -> Tensor:
        """(batch, length, width) → the same shape."""
        for layer in self.layers:
            x = layer(x)
        return x


class TextModel(nn.Module):
    """The whole network under the name that the published keys start with."""

    def __init__(self, vocabulary: int, width: int, layers: int, heads: int, length: int) -> None:
        super().__init__()
        self.embeddings = Embeddings(vocabulary, width, length)
        self.encoder = Encoder(width, layers, heads)
        self.final_layer_norm = nn.LayerNorm(width)

    def forward(self, embeddings: Tensor) -> Tensor:
        """(batch, length, width) → the same shape."""
        x = self.embeddings(embeddings)
        return self.final_layer_norm(self.encoder(x))


class TextEncoder(Network):
    """Tokens → a state for each of them. The default has 123.1 M parameters.

    It has two steps, so that textual inversion can put an embedding of its own in the place of a
    token's: `embed` looks the tokens up, and the call makes states of their embeddings. Each state
    depends on its token and those before it. Padding is not masked: Stable Diffusion v1 pads with
    the end token, 49407, and reads the states of all 77 tokens.
    """

    def __init__(
        self,
        vocabulary: int = 49408,
        width: int = 768,
        layers: int = 12,
        heads: int = 12,
        length: int = 77,
    ) -> None:
        super().__init__()
        self.config = {
            "net": "stable_diffusion_text_encoder",
            "arguments": {
                "vocabulary": vocabulary,
                "width": width,
                "layers": layers,
                "heads": heads,
                "length": length,
            },
        }
        if width % heads:
            raise ValueError(f"a width of {width} cannot be split among {heads} heads")
        self.text_model = TextModel(vocabulary, width, layers, heads, length)
        self._initialise()

    def _initialise(self) -> None:
        """CLIP's initial weights, from which a small encoder is trained."""
        width = self.config["arguments"]["width"]
        layers = self.config["arguments"]["layers"]
        end = (2 * layers * width) ** -0.5  # of a residual branch: smaller the more there are
        nn.init.normal_(self.text_model.embeddings.token_embedding.weight, std=0.02)
        nn.init.normal_(self.text_model.embeddings.position_embedding.weight, std=0.01)
        for module in self.modules():
            if isinstance(module, CausalAttention):
                for projection in (module.q_proj, module.k_proj, module.v_proj):
                    nn.init.normal_(projection.weight, std=width**-0.5)
                nn.init.normal_(module.out_proj.weight, std=end)
            elif isinstance(module, FeedForward):
                nn.init.normal_(module.fc1.weight, std=(2 * width) ** -0.5)
                nn.init.normal_(module.fc2.weight, std=end)
            if isinstance(module, nn.Linear):
                nn.init.zeros_(module.bias)

    def embed(self, ids: Tensor) -> Tensor:
        """Token ids, int64 (batch, length) → their embeddings (batch, length, width).

        The positions are not in them: the call adds them.
        """
        return self.text_model.embeddings.token_embedding(ids)

    def forward(self, embeddings: Tensor) -> Tensor:
        """Embeddings of tokens (batch, length, width) → their states, of the same shape.

        The length may be shorter than that of the constructor; ValueError if it is longer.
        """
        return self.text_model(embeddings)
