"""What was published: figures of others, each with its source. What a source doesn't tell is absent here.

All accuracies are of Swin-Tiny from scratch. Those of arXiv 2212.14215 and of InfoPro on transformers are known to us
as arXiv 2309.17357 quotes them (its Table 4): resolution, schedule and decoders behind them are not told, nor the
figures for SVHN and for K = 2. The authors of 2309.17357 report the best epoch on test data; ours read it once.
"""

from __future__ import annotations

from dataclasses import dataclass

TRGL = "arXiv 2309.17357, Table 4"
QUOTED = "arXiv 2212.14215, Table 3, as quoted by arXiv 2309.17357, Table 4"
ABSTRACT = "arXiv 2212.14215, abstract"
RECIPES = {
    TRGL: "300 epochs, batch 1024, AdamW with weight decay 0.05, cosine with 20 epochs of warm-up, label smoothing "
    "0.1, drop path 0.1, split at Swin's stages, average pool and a linear layer as auxiliary head; best epoch on "
    "test data",
    QUOTED: "recipe not told in what can be had",
    ABSTRACT: "recipe not told in what can be had",
}
"""By source, what is known of how a figure was made."""
FEATURE = ("feature-linear", "feature-conv", "feature-transformer")


@dataclass(frozen=True, kw_only=True)
class Published:
    """One published figure.

    Attributes:
        methods: ours that it stands beside; several where a paper doesn't tell which of them it ran.
        data: the data set; ``None`` where it is claimed for all.
        modules: local modules, K.
        accuracy: test accuracy in percent; ``None`` where it isn't known.
        spread: of the accuracy over seeds, in points.
        memory_saving: share of the end-to-end peak that was saved, in percent.
        source: paper and table; its recipe is in ``RECIPES``.
    """

    methods: tuple[str, ...]
    data: str | None
    modules: int
    accuracy: float | None = None
    spread: float | None = None
    memory_saving: float | None = None
    source: str

    @property
    def cited(self) -> str:
        """Source and recipe."""
        return f"{self.source}: {RECIPES[self.source]}"

    def __str__(self) -> str:
        spread = "" if self.spread is None else f" ± {self.spread:.2f}"
        accuracy = [] if self.accuracy is None else [f"{self.accuracy:.2f}{spread}"]
        memory = [] if self.memory_saving is None else [f"−{self.memory_saving:g} % memory"]  # noqa: RUF001  # a minus
        return ", ".join(accuracy + memory)


_QUOTED_FROM_TABLE = {  # data set -> percent: end-to-end, InfoPro on transformers, feature reconstruction
    "cifar10": (91.37, 83.38, 86.28),
    "cifar100": (75.03, 68.36, 73.00),
    "stl10": (72.19, 64.61, 66.89),
}
_OWN_OF_TABLE = {  # data set -> (accuracy, spread, memory saving): plain greedy, TRGL
    "cifar10": ((83.94, 0.42, 33), (86.48, 0.54, 29)),
    "cifar100": ((69.34, 0.91, 33), (74.11, 0.31, 29)),
    "stl10": ((67.00, 1.36, 55), (67.92, 1.12, 50)),
}


def _quoted(data: str) -> list[Published]:
    rows = ((("end-to-end",), 1, None), (("image",), 4, 38), (FEATURE, 4, 45))
    return [
        Published(methods=methods, data=data, modules=k, accuracy=accuracy, memory_saving=saving, source=QUOTED)
        for (methods, k, saving), accuracy in zip(rows, _QUOTED_FROM_TABLE[data], strict=True)
    ]


def _own(data: str) -> list[Published]:
    return [
        Published(
            methods=(method,), data=data, modules=4, accuracy=mean, spread=spread, memory_saving=saving, source=TRGL
        )
        for method, (mean, spread, saving) in zip(("greedy", "trgl"), _OWN_OF_TABLE[data], strict=True)
    ]


PUBLISHED: tuple[Published, ...] = (
    *(figure for data in _QUOTED_FROM_TABLE for figure in (*_quoted(data), *_own(data))),
    Published(methods=FEATURE, data=None, modules=2, memory_saving=36, source=ABSTRACT),
    Published(methods=FEATURE, data=None, modules=4, memory_saving=45, source=ABSTRACT),
)


def published_for(data: str, method: str, modules: int) -> Published | None:
    """The figure that stands beside one of ours; one of that data set rather than one claimed for all."""
    found = [
        figure
        for figure in PUBLISHED
        if method in figure.methods and figure.modules == modules and figure.data in (data, None)
    ]
    return min(found, key=lambda figure: figure.data is None, default=None)
