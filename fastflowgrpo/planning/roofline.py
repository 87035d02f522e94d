"""The least time that an epoch takes on a GPU, by the roofline model: ``--dry_run --gpu a100``.

A phase takes at least the time of its FLOPs at the card's peak rate, and at least the time to read its weights once per
pass at the card's bandwidth (Williams et al., "Roofline", CACM 52(4), 2009). Everything else is left out: activations,
kernels that do not reach the peak, waiting, the optimiser, communication, and networks that score. So this is a bound
and not a forecast.

The rates are NVIDIA's published ones, dense (without sparsity) and with float32 accumulation:

- a100, a800: "A100 Tensor Core GPU" and "A800 Tensor Core GPU" data sheets, 80 GB SXM.
- h100: "H100 Tensor Core GPU Architecture" whitepaper, SXM5; bandwidth from the data sheet.
- h200: "H200 Tensor Core GPU" data sheet, SXM; its tensor cores are the H100's.
- 4090: "NVIDIA Ada GPU Architecture" whitepaper, appendix A, GeForce RTX 4090.
"""

from collections.abc import Mapping
from dataclasses import dataclass

UTILIZATION = 0.4  # share of the peak rates in the second column of `roofline_table`


@dataclass(frozen=True)
class Card:
    """The peak rates of a GPU."""

    half: float
    """FLOP/s of matrix products in bfloat16 and float16."""
    tf32: float
    """FLOP/s of products of float32 tensors in TF32: the most that float32 reaches, and less where TF32 is off."""
    bandwidth: float
    """Bytes/s of the memory."""


_A100 = Card(half=312e12, tf32=156e12, bandwidth=2.039e12)
CARDS: Mapping[str, Card] = {
    "a800": _A100,  # slower NVLink only
    "a100": _A100,
    "h100": Card(half=989.4e12, tf32=494.7e12, bandwidth=3.35e12),
    "h200": Card(half=989.4e12, tf32=494.7e12, bandwidth=4.8e12),
    "4090": Card(half=165.2e12, tf32=82.6e12, bandwidth=1.008e12),
}


@dataclass(frozen=True)
class Work:
    """What the busiest process does in a phase of an epoch."""

    flops: float
    passes: int
    weights: int
    """Bytes of the weights that each pass reads."""
    dtype: str
    """Of the computation: float32, bfloat16 or float16."""

    def least_seconds(self, card: Card) -> float:
        """Return the seconds that the phase takes at least, at the card's peak rates."""
        rate = card.tf32 if self.dtype == "float32" else card.half
        return max(self.flops / rate, self.passes * self.weights / card.bandwidth)


def roofline_table(work: Mapping[str, Work], images: int, gpu: str) -> str:
    """Return the least seconds of each phase and the most images/s, at the peak rates and at `UTILIZATION` of them.

    Args:
        work: by phase; the phases' times add up, since they share the GPU even where they overlap.
        images: of an epoch, of all processes.
        gpu: a name in `CARDS`.
    """
    card = CARDS[gpu]
    seconds = {phase: of_phase.least_seconds(card) for phase, of_phase in work.items()}
    seconds["all"] = sum(seconds.values())
    rows = [(f"{phase}, s", value, value / UTILIZATION) for phase, value in seconds.items()]
    rows.append(("images/s", images / seconds["all"], images / seconds["all"] * UTILIZATION))
    return "\n".join(
        [
            f"least time of an epoch on {gpu} ({card.half / 1e12:g} TFLOP/s, in float32 {card.tf32 / 1e12:g}, "
            f"{card.bandwidth / 1e12:g} TB/s): a bound, not a forecast",
            f"  {'share of these rates':<36}{'100 %':>10}{f'{100 * UTILIZATION:g} %':>11}",
            *(f"  {name:<36}{peak:10.4g}{shared:11.4g}" for name, peak, shared in rows),
        ]
    )
