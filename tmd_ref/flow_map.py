"""A Wan transformer that is a flow map: it is told the time to go to beside the time where it is (AnyFlow, arXiv
2605.13724).

Its output u(x_t, t, r) is the mean velocity noise - data on the way from t to r, so x_r = x_t - (t - r)·u for any r in
0..t, and any number of steps leads to data. It is Wan's transformer in everything but the embedding of time. Parameter
names are those of `tmd_ref.wan`, with `delta_embedding` beside `time_embedding`. What it is not: the causal variant
(FAR), which goes chunk by chunk.
"""

from torch import Tensor, nn

from tmd_ref.ops import at_least_float32, cast_for
from tmd_ref.split import SplitWan, VelocityHead
from tmd_ref.student import Backbone
from tmd_ref.wan import WanConfig, WanTransformer, time_sinusoid, without_autocast

GATE = 0.25
"""The share of r in the embedding of time; what all of AnyFlow's models have (NVlabs/AnyFlow, `gate_value`)."""


def embed_times(module: nn.Module, t: Tensor, r: Tensor, gate: float, freq_dim: int) -> tuple[Tensor, Tensor]:
    """(1 - gate)·embed(t) + gate·embed'(r) by the layers of `module`; t and r `[B]` in 0..1.

    Returns e `[B, D]` and e0 `[B, 6, D]` as `tmd_ref.wan.embed_time` (diffusers 0.42, transformer_anyflow.py,
    `forward_timestep`, of the type "r").
    """
    first, second = module.get_submodule("time_embedding"), module.get_submodule("delta_embedding")
    now, target = time_sinusoid(t, freq_dim), time_sinusoid(r, freq_dim)
    with without_autocast(now):
        e = (1 - gate) * first(cast_for(first, now)) + gate * second(cast_for(second, target))
        e0 = module.get_submodule("time_projection")(e).unflatten(-1, (6, -1))
    return at_least_float32(e), at_least_float32(e0)


class FlowMapWan(WanTransformer):
    """`WanTransformer` with a second embedding of time, `delta_embedding`, and `gate` between both."""

    def __init__(self, config: WanConfig, gate: float = GATE) -> None:
        super().__init__(config)
        self.gate = gate
        dim = config.dim
        layers = nn.Linear(config.freq_dim, dim), nn.SiLU(), nn.Linear(dim, dim)
        self.delta_embedding = nn.Sequential(*layers)
        for layer in (layers[0], layers[2]):
            nn.init.normal_(layer.weight, std=0.02)

    def forward(  # type: ignore[override]  # it is told one time more
        self, x: Tensor, t: Tensor, r: Tensor, prompt_embeds: Tensor, rope: tuple[Tensor, Tensor] | None = None
    ) -> Tensor:
        """The mean velocity from t to r `[B]`, 0 <= r <= t <= 1; the rest as `WanTransformer.forward`."""
        return self.velocity(x, embed_times(self, t, r, self.gate, self.config.freq_dim), prompt_embeds, rope)


class FlowMapBackbone(Backbone):
    """`Backbone` that is told r as well."""

    def __init__(self, wan: FlowMapWan, head_blocks: int) -> None:
        super().__init__(wan, head_blocks)
        self.gate, self.delta_embedding = wan.gate, wan.delta_embedding

    def forward(  # type: ignore[override]
        self, x: Tensor, t: Tensor, prompt_embeds: Tensor, cos: Tensor, sin: Tensor, r: Tensor
    ) -> tuple[Tensor, Tensor]:
        """As `Backbone.forward`; r `[B]` in 0..t."""
        _, e0 = embed_times(self, t, r, self.gate, self.config.freq_dim)
        return self.features(x, e0, prompt_embeds, cos, sin)


class FlowMapHead(VelocityHead):
    """`VelocityHead` that is told r as well."""

    def __init__(self, wan: FlowMapWan, head_blocks: int) -> None:
        super().__init__(wan, head_blocks)
        self.gate, self.delta_embedding = wan.gate, wan.delta_embedding

    def forward(  # type: ignore[override]
        self, x: Tensor, t: Tensor, features: Tensor, context: Tensor, cos: Tensor, sin: Tensor, r: Tensor
    ) -> Tensor:
        """As `VelocityHead.forward`; r `[B]` in 0..t."""
        times = embed_times(self, t, r, self.gate, self.config.freq_dim)
        return self.velocity(x, times, features, context, cos, sin)


class SplitFlowMap(SplitWan):
    """`SplitWan` of a flow map."""

    parts = FlowMapBackbone, FlowMapHead

    def forward(  # type: ignore[override]
        self, x: Tensor, t: Tensor, r: Tensor, prompt_embeds: Tensor, rope: tuple[Tensor, Tensor] | None = None
    ) -> Tensor:
        """As `FlowMapWan.forward`."""
        cos, sin = rope or self.rope(x)
        features, context = self.backbone(x, t, prompt_embeds, cos, sin, r)
        velocity: Tensor = self.head(x, t, features, context, cos, sin, r)
        return velocity
