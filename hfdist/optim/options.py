"""Every rule of a Hessian-free step that can be chosen: the `optim.*` keys of a job file.

The names of PyTorchHessianFree's constructor arguments are kept, so that its users find them. Each group of
keys is defined beside the code that follows it; this file puts them together.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

from hfdist.optim.choice import ChoiceOptions
from hfdist.optim.damping import DampingOptions
from hfdist.optim.option_group import OptionGroup
from hfdist.optim.solvers import SolverOptions

PRESETS: dict[str, dict[str, Any]] = {
    # What the literature does; the defaults below.
    "default": {},
    # PyTorchHessianFree's rules, for migration and comparison.
    "pytorch_hessianfree": {
        "solver": "cg",
        "preconditioner": "none",
        "cg_stop": "relative_progress",
        "nonpositive_curvature": "ignore",
        "reduction_ratio": "damped",
        "reduction_ratio_at": "last",
        "linesearch_max_iter": 20,
        "reset_warm_start": False,
        "raise_damping_on_reject": False,
        "damping_max": math.inf,
    },
}
PRESETS["seed"] = PRESETS["pytorch_hessianfree"]  # its first name


@dataclass(frozen=True, kw_only=True)
class ProductOptions(OptionGroup):
    """Curvature products, and how vectors lie over ranks."""

    RANGES: ClassVar[dict[str, tuple[float, float]]] = {
        "memory_budget": (0, math.inf),
        "weight_decay": (0.0, math.inf),
    }

    curvature_opt: Literal["ggn", "hessian"] = "ggn"
    """Curvature matrix of the quadratic model: generalized Gauss-Newton, or the Hessian."""
    weight_decay: float = 0.0
    """L2 coefficient: adds weight_decay/2 |theta|^2 to the loss, in value, gradient and product."""
    product_engine: Literal["linearize", "double_backward", "recompute"] = "linearize"
    """How products are computed: by replaying the forward pass on tangents (double backward where that
    is impossible), by double backward, or without keeping anything between products (least memory)."""
    verify: Literal["first", "always", "off"] = "first"
    """Check gradient and products of one microbatch against differences of losses and outputs: on the first
    solve, and when other operations are replayed than before; on every solve; or never. A product engine
    that is wrong is replaced, and a gradient that is wrong is an error."""
    memory_budget: int | None = None
    """Bytes for the graphs that are kept between products; microbatches beyond it are recomputed for
    every product, with the same result. null: what the device has left, less what solver and preconditioner
    need; of a host half."""
    product_autocast: Literal["off", "bfloat16"] = "off"
    """Compute the forward passes of products under torch.autocast, which costs a forward pass a step:
    loss and gradient stay as they are."""
    capture_products: bool = False
    """Run the replayed products of kept graphs as graphs of the device's kernels (CUDA graphs), one launch
    each: for small models, whose kernels are shorter than their launches. Where there can be none, a warning
    says why. Not yet measured on any device."""
    shard_solver_state: bool = False
    """Hold 1/W of every vector of the solver and kept iterate on each of W ranks, instead of all of them."""
    reduction_dtype: Literal["full", "bfloat16"] = "full"
    """Sum products over ranks as they are, or rounded to bfloat16, which halves float32's traffic; give
    `cg_residual_replacement`, too, whose products are summed as they are. Gradients always are."""


@dataclass(frozen=True, kw_only=True)
class PreconditionerOptions(OptionGroup):
    """Preconditioner of CG, metric of the Krylov space."""

    RANGES: ClassVar[dict[str, tuple[float, float]]] = {
        "preconditioner_exponent": (0.0, 1.0),
        "preconditioner_examples": (1e-6, 1.0),
        "preconditioner_samples": (1, 1000),
        "preconditioner_refresh": (1, 10**9),
        "preconditioner_decay": (0.0, 0.9999),
        "ekfac_basis_refresh": (1, 10**9),
        "nystrom_rank": (1, 10**6),
        "lbfgs_pairs": (1, 1000),
    }

    preconditioner: Literal[
        "none", "auto", "kfac", "ekfac", "ggn_diagonal", "empirical_fisher", "nystrom", "lbfgs"
    ] = "kfac"
    """none; Kronecker factors of the layers' Gauss-Newton blocks (Martens & Grosse 2015), or the blocks' own
    diagonal in these factors' eigenvectors (George et al. 2018); the Gauss-Newton diagonal [3]; the empirical
    Fisher diagonal [1, sec. 4.7]; a random low-rank approximation (Frangella et al. 2023); BFGS pairs of the
    last solve [5]. auto: kfac where at least half of the parameters are in layers that it knows, else
    empirical_fisher."""
    preconditioner_exponent: float = 0.75
    """Exponent of the diagonal preconditioners of `cg` and `steihaug`; metrics have none."""
    preconditioner_examples: float = 0.25
    """Share of the gradient's examples that the statistics of `kfac`, `ekfac` and `ggn_diagonal` are taken
    from."""
    preconditioner_samples: int = 1
    """Random vectors an example for these statistics; each is a backward pass, or a product."""
    preconditioner_refresh: int | Literal["auto"] = "auto"
    """A metric of `kfac` or `ekfac` (statistics and inverses) serves so many steps; of `ggn_diagonal`, and
    with `cg` and `steihaug`, the statistics do. auto: 1, but a metric whose counted work is more than 15% of
    a step's serves as many, up to 20, as make it about a tenth of theirs. After a rejected step, or where
    lambda has moved tenfold, there is a new one at once, as in the first five steps."""
    preconditioner_decay: float | None = None
    """Weight of what earlier steps saw in the moving average of these statistics, a factor a refresh; null:
    0.8 where a step sees all examples, 0.9 otherwise."""
    kfac_shared: Literal["expand", "reduce"] = "expand"
    """Uses of one weight within an example (positions of a convolution, of a sequence) count as examples of
    their own, or as one use of the mean input (Eschenhagen et al. 2023)."""
    ekfac_basis_refresh: int = 4
    """New eigenvectors of `ekfac` every so many refreshes of its statistics."""
    ggn_diagonal_estimate: Literal["mc", "exact", "hutchinson"] = "mc"
    """From random vectors of the outputs; from all columns of the loss's Hessian, a backward pass each; or
    from products with random vectors of the parameters."""
    nystrom_rank: int = 20
    """Products that `nystrom` is built from, each step."""
    lbfgs_pairs: int = 16
    """Most products of the last solve that `lbfgs` is built from."""


@dataclass(frozen=True, kw_only=True)
class HFOptions(
    PreconditionerOptions, ChoiceOptions, ProductOptions, SolverOptions, DampingOptions
):
    """Rules and constants of one Hessian-free step. Sources: see `hfdist.optim`.

    Raises:
        ValueError: A value is out of its range; the message names the key and the range.
    """

    preset: Literal["default", "pytorch_hessianfree", "seed"] = "default"
    """Base set of rules that the other keys change: the literature's, or PyTorchHessianFree's ("seed" is
    its first name)."""

    def check(self) -> None:
        if self.structural_damping and self.solver not in ("auto", "krylov", "cg"):
            raise ValueError(
                f"structural_damping is {self.structural_damping:g}: solver={self.solver} has no such term; "
                "set it to 0, or take solver=krylov or cg"
            )
        if self.structural_damping and self.krylov_basis == "none":
            raise ValueError(
                f"structural_damping is {self.structural_damping:g}: krylov_basis=none has no space to "
                "project it into; take another basis, or set it to 0"
            )
        if self.shard_solver_state and self.solver in ("dense", "sample_space"):
            raise ValueError(
                f"shard_solver_state is true: solver={self.solver} holds whole matrices and vectors; set it "
                "to false, or choose another solver"
            )

    @classmethod
    def with_preset(cls, preset: str = "default", **changes: Any) -> HFOptions:
        """Options of `preset`, with `changes` on top.

        Raises:
            ValueError: `preset` or a change is not known.
        """
        if preset not in PRESETS:
            raise ValueError(f"preset is {preset!r}: it must be one of {', '.join(PRESETS)}")
        return cls(**current({"preset": preset, **PRESETS[preset], **changes}))


def current(values: Mapping[str, Any]) -> dict[str, Any]:
    """Options under today's names: what earlier versions called otherwise, with one warning, and `off`,
    which YAML reads as false."""
    found = dict(values)
    engine = found.get("product_engine")
    if engine in ("auto", "compile", "torch_linearize"):
        warnings.warn(
            f"product_engine={engine} is gone: linearize takes its place",
            FutureWarning,
            stacklevel=3,
        )
        found["product_engine"] = "linearize"
    for key in ("verify", "product_autocast"):
        if found.get(key) is False:
            found[key] = "off"
    return found
