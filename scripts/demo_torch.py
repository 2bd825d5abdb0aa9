"""The demo model in PyTorch: Qwen2-MoE (granular experts, gated shared expert, top-k not renormalised).

Module names follow the Hugging Face checkpoint layout, so that ``state_dict`` needs little renaming. The Muon
optimiser for matrices stands here too; everything else of training is in train_demo_model.py.
Letters in shapes: B batch, L length, T = B * L rows, D hidden, E experts, K active, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn


@dataclass(frozen=True)
class DemoConfig:
    vocab_size: int = 4096
    hidden_size: int = 192  # D
    num_hidden_layers: int = 6
    num_attention_heads: int = 3
    num_experts: int = 60  # E
    num_experts_per_tok: int = 4  # K
    moe_intermediate_size: int = 64
    shared_expert_intermediate_size: int = 192
    rms_norm_eps: float = 1e-6
    rope_theta: float = 10000.0
    max_position_embeddings: int = 2048

    @property
    def head_dim(self) -> int:
        return self.hidden_size // self.num_attention_heads


class Attention(nn.Module):
    def __init__(self, c: DemoConfig) -> None:
        super().__init__()
        D, self.heads, self.head_dim = c.hidden_size, c.num_attention_heads, c.head_dim
        self.q_proj, self.k_proj, self.v_proj = (nn.Linear(D, D, bias=True) for _ in range(3))
        self.o_proj = nn.Linear(D, D, bias=False)
        freqs = c.rope_theta ** (-torch.arange(0, self.head_dim, 2).float() / self.head_dim)
        angles = torch.outer(torch.arange(c.max_position_embeddings).float(), freqs)
        self.register_buffer("cos", angles.cos(), persistent=False)
        self.register_buffer("sin", angles.sin(), persistent=False)

    def rope(self, x: Tensor) -> Tensor:  # [B, heads, L, head_dim], halves as in the Hugging Face convention
        a, b = x.chunk(2, dim=-1)
        cos, sin = self.cos[: x.shape[2]], self.sin[: x.shape[2]]
        return torch.cat([a * cos - b * sin, b * cos + a * sin], dim=-1)

    def forward(self, x: Tensor) -> Tensor:
        B, L, D = x.shape
        shape = (B, L, self.heads, self.head_dim)
        q, k, v = (p(x).view(shape).transpose(1, 2) for p in (self.q_proj, self.k_proj, self.v_proj))
        y = F.scaled_dot_product_attention(self.rope(q), self.rope(k), v, is_causal=True)
        return self.o_proj(y.transpose(1, 2).reshape(B, L, D))


class SharedExpert(nn.Module):
    def __init__(self, D: int, inner: int) -> None:
        super().__init__()
        self.gate_proj, self.up_proj = nn.Linear(D, inner, bias=False), nn.Linear(D, inner, bias=False)
        self.down_proj = nn.Linear(inner, D, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))


class MoE(nn.Module):
    """Sorted by expert: one product per expert over its own rows, no padding and no dropped tokens."""

    def __init__(self, c: DemoConfig) -> None:
        super().__init__()
        E, D, inner = c.num_experts, c.hidden_size, c.moe_intermediate_size
        self.E, self.K = E, c.num_experts_per_tok
        self.gate = nn.Linear(D, E, bias=False)
        self.gate_proj = nn.Parameter(torch.empty(E, inner, D))
        self.up_proj = nn.Parameter(torch.empty(E, inner, D))
        self.down_proj = nn.Parameter(torch.empty(E, D, inner))
        self.shared_expert = SharedExpert(D, c.shared_expert_intermediate_size)
        self.shared_expert_gate = nn.Linear(D, 1, bias=False)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        B, L, D = x.shape
        x = x.reshape(-1, D)
        p = self.gate(x).softmax(-1)  # [T, E]
        w, idx = p.topk(self.K, dim=-1)
        flat = idx.flatten()
        order = flat.argsort()
        rows = order // self.K
        counts = torch.bincount(flat, minlength=self.E)
        parts = x[rows].split(counts.tolist())
        weights = (w.unbind() for w in (self.gate_proj, self.up_proj, self.down_proj))
        experts = zip(parts, *weights, strict=True)
        out = torch.cat([F.linear(F.silu(F.linear(h, g)) * F.linear(h, u), d) for h, g, u, d in experts])
        y = torch.zeros_like(x).index_add(0, rows, out * w.flatten()[order, None])
        y = y + self.shared_expert_gate(x).sigmoid() * self.shared_expert(x)
        # Switch balancing loss: E * sum(share of selections * mean probability); 1 when perfectly even.
        balance = self.E * torch.sum(counts / flat.numel() * p.mean(0))
        return y.view(B, L, D), balance


class Block(nn.Module):
    def __init__(self, c: DemoConfig) -> None:
        super().__init__()
        self.self_attn, self.mlp = Attention(c), MoE(c)
        self.input_layernorm = nn.RMSNorm(c.hidden_size, eps=c.rms_norm_eps)
        self.post_attention_layernorm = nn.RMSNorm(c.hidden_size, eps=c.rms_norm_eps)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        x = x + self.self_attn(self.input_layernorm(x))
        y, balance = self.mlp(self.post_attention_layernorm(x))
        return x + y, balance


class DemoModel(nn.Module):
    def __init__(self, c: DemoConfig) -> None:
        super().__init__()
        self.config = c
        self.embed_tokens = nn.Embedding(c.vocab_size, c.hidden_size)
        self.layers = nn.ModuleList(Block(c) for _ in range(c.num_hidden_layers))
        self.norm = nn.RMSNorm(c.hidden_size, eps=c.rms_norm_eps)
        self.lm_head = nn.Linear(c.hidden_size, c.vocab_size, bias=False)
        for name, p in self.named_parameters():
            if p.dim() >= 2:
                output = "down_proj" in name or "o_proj" in name  # into the residual stream: start small
                nn.init.normal_(p, std=0.02 / 12**0.5 if output else 0.02)
            elif "bias" in name:
                nn.init.zeros_(p)

    def forward(self, ids: Tensor) -> tuple[Tensor, Tensor]:
        """ids [B, L] -> logits [B, L, V], mean balancing loss."""
        x, total = self.embed_tokens(ids), 0.0
        for layer in self.layers:
            x, balance = layer(x)
            total = total + balance
        return self.lm_head(self.norm(x)), total / len(self.layers)


class Muon(torch.optim.Optimizer):
    """Momentum whose matrix updates are orthogonalised by five Newton-Schulz steps (Jordan et al., 2024).

    Updates are scaled by 0.2 * sqrt(max(rows, columns)), which gives them AdamW's usual size, so that one
    learning rate serves both (Liu et al., arXiv 2502.16982). Stacked experts [E, out, in] are orthogonalised
    one by one.
    """

    def __init__(
        self, params: Iterable[nn.Parameter], lr: float, momentum: float = 0.95, weight_decay: float = 0.1
    ) -> None:
        super().__init__(params, {"lr": lr, "momentum": momentum, "weight_decay": weight_decay})

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> None:
        for group in self.param_groups:
            for p in group["params"]:
                m = self.state[p].setdefault("m", torch.zeros_like(p))
                m.lerp_(p.grad, 1 - group["momentum"])
                update = orthogonalise(p.grad.lerp(m, group["momentum"]))
                p.mul_(1 - group["lr"] * group["weight_decay"])
                p.add_(update, alpha=-group["lr"] * 0.2 * max(p.shape[-2:]) ** 0.5)


def orthogonalise(g: Tensor) -> Tensor:
    """The nearest (semi-)orthogonal matrix of each matrix of g [..., m, n], approximately."""
    a, b, c = 3.4445, -4.7750, 2.0315
    x = g / (g.norm(dim=(-2, -1), keepdim=True) + 1e-7)
    tall = x.shape[-2] > x.shape[-1]
    x = x.mT if tall else x
    for _ in range(5):
        s = x @ x.mT
        x = a * x + (b * s + c * s @ s) @ x
    return x.mT if tall else x
