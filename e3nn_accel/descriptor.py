"""What a module computes: frozen, hashable, free of torch state.

Two modules with equal descriptors share one plan. Weights are never part of a descriptor, coupling
constants are: a module loaded from a file carries its own (the signs of six Wigner 3j symbols differ
between e3nn 0.4.4 and 0.5, and a float32 file holds rounded ones), so they are compared by content.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass, field
from math import prod
from typing import Any, Literal, get_args

import numpy as np
from numpy.typing import NDArray

from e3nn_accel.irreps import Irreps, show

Mode = Literal["uvw", "uvu", "uvv", "uuw", "uuu", "uvuv", "uvu<v", "u<vw"]
MODES: tuple[str, ...] = get_args(Mode)


@dataclass(frozen=True)
class Coupling:
    """A constant tensor, stored sparse and compared by content.

    Attributes:
        shape: Shape of the dense tensor.
        digest: Hash of shape, indices and values.
        epsilon: Rounding unit of the dtype the constants were stored in; what they can be trusted to.
        indices: Positions of the non-zeros, [non-zeros, dimensions].
        values: Their values, float64.
    """

    shape: tuple[int, ...]
    digest: str
    epsilon: float
    indices: NDArray[np.int64] = field(compare=False, repr=False)
    values: NDArray[np.float64] = field(compare=False, repr=False)

    @classmethod
    def of(cls, dense: NDArray[Any]) -> Coupling:
        """From a dense array of any float dtype."""
        indices = np.argwhere(dense != 0).astype(np.int64)
        values = dense[tuple(indices.T)].astype(np.float64)
        digest = hashlib.sha256()
        for part in (np.array(dense.shape), indices, values):
            digest.update(np.ascontiguousarray(part).tobytes())
        epsilon = float(np.finfo(dense.dtype).eps)
        return cls(tuple(dense.shape), digest.hexdigest()[:16], epsilon, indices, values)

    def dense(self) -> NDArray[np.float64]:
        """The dense tensor, float64."""
        out = np.zeros(self.shape)
        out[tuple(self.indices.T)] = self.values
        return out


@dataclass(frozen=True)
class LinearPath:
    """One instruction of ``o3.Linear``; ``i_in == -1`` is a bias."""

    i_in: int
    i_out: int
    path_shape: tuple[int, ...]
    path_weight: float


@dataclass(frozen=True)
class LinearDescriptor:
    """``o3.Linear``: out[w,k] = bias[w] + sum over paths of path_weight * sum_u W[u,w] x[u,k].

    Attributes:
        f_in: Number of input feature columns, or None for the ordinary case without them.
        f_out: Number of output feature columns.
        shared_weights: One weight for all rows, or one for each.
    """

    irreps_in: Irreps
    irreps_out: Irreps
    paths: tuple[LinearPath, ...]
    f_in: int | None
    f_out: int | None
    shared_weights: bool
    internal_weights: bool

    @property
    def weight_numel(self) -> int:
        """Weights of one row (and one pair of feature columns)."""
        return sum(prod(path.path_shape) for path in self.paths if path.i_in != -1)

    @property
    def bias_numel(self) -> int:
        """Biases of one row (and one feature column)."""
        return sum(prod(path.path_shape) for path in self.paths if path.i_in == -1)

    def __str__(self) -> str:
        return f"linear {show(self.irreps_in)} -> {show(self.irreps_out)}"


@dataclass(frozen=True)
class ProductPath:
    """One instruction of a tensor product.

    Attributes:
        path_weight: The final coefficient, with normalisations and variances folded in by e3nn.
        coupling: C[i,j,k] as this module uses it (Wigner 3j, or e3nn's specialised form of it).
    """

    i_in1: int
    i_in2: int
    i_out: int
    mode: str
    has_weight: bool
    path_weight: float
    path_shape: tuple[int, ...]
    coupling: Coupling


@dataclass(frozen=True)
class TensorProductDescriptor:
    """``o3.TensorProduct`` and its subclasses, edge by edge."""

    irreps_in1: Irreps
    irreps_in2: Irreps
    irreps_out: Irreps
    paths: tuple[ProductPath, ...]
    shared_weights: bool
    internal_weights: bool

    @property
    def weight_numel(self) -> int:
        """Weights of one row."""
        return sum(prod(path.path_shape) for path in self.paths if path.has_weight)

    def __str__(self) -> str:
        modes = "/".join(sorted({path.mode for path in self.paths})) or "no paths"
        return f"{modes} {show(self.irreps_in1)} (x) {show(self.irreps_in2)} -> {show(self.irreps_out)}"


@dataclass(frozen=True)
class ConvolutionDescriptor:
    """Gather the sender's features, multiply with the edge, sum at the receiver."""

    product: TensorProductDescriptor

    def __str__(self) -> str:
        return f"convolution {self.product}"


@dataclass(frozen=True)
class ContractionOutput:
    """One output irrep of MACE's SymmetricContraction.

    Attributes:
        l: Degree of the output.
        couplings: U for nu = 1 .. correlation, each of shape [2l+1] + [components] * nu + [paths].
    """

    l: int  # noqa: E741
    couplings: tuple[Coupling, ...]


@dataclass(frozen=True)
class ContractionDescriptor:
    """MACE's SymmetricContraction: polynomials in each node's features, weighted by its species.

    out[b,c,m] = sum_nu sum_k W_nu[z(b),k,c] sum_{i1..inu} U_nu[m,i1..inu,k] x[b,c,i1] .. x[b,c,inu]

    ``degrees`` are l of the irreps that the components of x are of, in order; empty where not known.
    """

    channels: int
    components: int
    species: int
    outputs: tuple[ContractionOutput, ...]
    degrees: tuple[int, ...] = ()

    @property
    def weight_shapes(self) -> tuple[tuple[int, int, int], ...]:
        """[species, paths, channels] of each weight: outputs in order, nu = 1 .. correlation within."""
        return tuple(
            (self.species, coupling.shape[-1], self.channels)
            for output in self.outputs
            for coupling in output.couplings
        )

    def __str__(self) -> str:
        degrees = "+".join(str(output.l) for output in self.outputs)
        order = max((len(output.couplings) for output in self.outputs), default=0)
        return (
            f"contraction of {self.components} components to l={degrees}, correlation {order}, "
            f"{self.channels} channels, {self.species} species"
        )


@dataclass(frozen=True)
class RadialLayer:
    """One layer of a radial MLP: gain * act(scale * x @ W).

    Attributes:
        activation: "identity", "silu", "tanh", "relu" or "sigmoid".
        gain: What normalises the activation, and the output's variance.
    """

    width_in: int
    width_out: int
    scale: float
    activation: str
    gain: float


@dataclass(frozen=True)
class RadialMlpDescriptor:
    """``e3nn.nn.FullyConnectedNet``: its layers one after the other."""

    layers: tuple[RadialLayer, ...]

    @property
    def widths(self) -> tuple[int, ...]:
        """Of the input and of each layer's output."""
        return (self.layers[0].width_in, *(layer.width_out for layer in self.layers))

    def __str__(self) -> str:
        acts = "/".join(sorted({layer.activation for layer in self.layers[:-1]})) or "no activation"
        return f"radial MLP {'-'.join(map(str, self.widths))}, {acts}"


@dataclass(frozen=True)
class SphericalHarmonicsDescriptor:
    """``o3.SphericalHarmonics``: the real spherical harmonics of these degrees, in their order, of vectors.

    Attributes:
        normalize: Whether vectors are divided by their length first.
        normalization: Of the components: "component", "norm" or "integral".
    """

    degrees: tuple[int, ...]
    normalize: bool
    normalization: str

    def __str__(self) -> str:
        of = "directions" if self.normalize else "vectors"
        degrees = "+".join(map(str, self.degrees))
        return f"spherical harmonics l={degrees} of {of}, {self.normalization}"


@dataclass(frozen=True)
class RadialEmbeddingDescriptor:
    """MACE's RadialEmbeddingBlock of Bessel functions: out[e,n] = c sin(w_n r) / r * f(r), f the polynomial cutoff.

    All of w, c, r_max and the exponent p are operands.

    Attributes:
        basis: Number of functions.
        integer_exponent: Whether p is kept as an integer (int32), or in the dtype of the lengths.
    """

    basis: int
    integer_exponent: bool

    def __str__(self) -> str:
        return f"radial embedding, {self.basis} Bessel functions"


@dataclass(frozen=True)
class ReshapeDescriptor:
    """MACE's reshape_irreps: out[n,u,c_l + m] = x[n, mul c_l + u d_l + m], where c_l is the sum of d before l.

    Attributes:
        mul: Channels, the multiplicity of all irreps.
        dims: d_l, components of each irrep.
    """

    mul: int
    dims: tuple[int, ...]

    @property
    def columns(self) -> int:
        """Components of a channel."""
        return sum(self.dims)

    def __str__(self) -> str:
        return f"reshape of {self.mul} channels, components {' + '.join(map(str, self.dims))}"


Descriptor = (
    LinearDescriptor
    | TensorProductDescriptor
    | ConvolutionDescriptor
    | ContractionDescriptor
    | RadialMlpDescriptor
    | SphericalHarmonicsDescriptor
    | RadialEmbeddingDescriptor
    | ReshapeDescriptor
)
