"""Operations: what a plan runs, and a formula for the cost of each.

Example: ``MatMul(1, m=s0, k=64, n=8, itemsize=2).cost`` is ``{"flops.nn": 1024*s0, "read":
128*s0 + 1024, "written": 16*s0, "launches": 1}``.

Invariant: a cost is a polynomial of the dimensions. The search fills in integers, the sizes of the
example tensors. The report fills in sympy symbols.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple, TypeAlias

from runlora_fx.cost_model.cost import Amount, Cost

#: The term of a product's FLOPs. The key says if the left and the right operand are stored
#: transposed. Two transposed operands count as none: ``(L R)' = R' L'``.
_FLOPS = {
    (False, False): "flops.nn",
    (False, True): "flops.nt",
    (True, False): "flops.tn",
    (True, True): "flops.nn",
}

#: The width of an element in float32 [B].
_SINGLE = 4


class GemmShape(NamedTuple):
    """Sizes and layouts of b products (m, k) @ (k, n): what a measured time is stored under.

    Attributes:
        b: Batch [products].
        m: Rows of the result [elements].
        k: Contracted dimension [elements].
        n: Columns of the result [elements].
        left_turned: True if the left operand is stored transposed.
        right_turned: True if the right operand is stored transposed.
    """

    b: int
    m: int
    k: int
    n: int
    left_turned: bool = False
    right_turned: bool = False

    @property
    def canonical(self) -> GemmShape:
        """One of the two spellings of the product: ``(L R)' = R' L'`` is the same library call."""
        turned = GemmShape(
            self.b, self.n, self.k, self.m, not self.right_turned, not self.left_turned
        )
        return min(self, turned)

    def product(self, itemsize: int) -> MatMul:
        """The products, of elements of a given width [B]."""
        turned = (self.left_turned, self.right_turned)
        return MatMul(self.b, self.m, self.k, self.n, itemsize, turned)


@dataclass(frozen=True)
class MatMul:
    """b products (m, k) @ (k, n) -> (m, n) of elements of ``itemsize`` bytes.

    Attributes:
        b: Batch [products].
        m: Rows of the result [elements].
        k: Contracted dimension [elements].
        n: Columns of the result [elements].
        itemsize: Element width [B].
        turned: For the left and the right operand, True if it is stored transposed.
    """

    b: Amount
    m: Amount
    k: Amount
    n: Amount
    itemsize: int
    turned: tuple[bool, bool] = (False, False)

    @property
    def cost(self) -> Cost:
        """2 b m k n FLOP of the layout; b (m k + k n) and b m n elements moved; 1 kernel."""
        b, m, k, n = self.b, self.m, self.k, self.n
        return Cost(
            {
                _FLOPS[self.turned]: 2 * b * m * k * n,
                "read": b * (m * k + k * n) * self.itemsize,
                "written": b * m * n * self.itemsize,
                "launches": 1,
            }
        )

    @property
    def layout(self) -> str:
        """The layout of the operands: nn, nt or tn (tt counts as nn: ``(L R)' = R' L'``)."""
        return _FLOPS[self.turned].rpartition(".")[2]

    @property
    def shape(self) -> GemmShape:
        """The key under which its measured time is stored. Its dimensions must be integers."""
        b, m, k, n = (int(size) for size in (self.b, self.m, self.k, self.n))
        return GemmShape(b, m, k, n, *self.turned).canonical


@dataclass(frozen=True)
class UpcastMatMul:
    """A product of 16-bit matrices that is computed in float32: casts, a product, and a cast back.

    Attributes:
        product: The product as the graph has it.
    """

    product: MatMul

    @property
    def cost(self) -> Cost:
        """Its FLOPs in float32; all three matrices read and written by casts; 4 kernels.

        That is the most it may take. Inductor fuses casts into the kernels before and after.
        """
        one = self.product
        elements = one.b * (one.m * one.k + one.k * one.n + one.m * one.n)
        return Cost(
            {
                "flops.upcast": one.cost.flops,
                "elementwise": elements * (one.itemsize + _SINGLE),
                "launches": 4,
            }
        )


class MergeShape(NamedTuple):
    """What the time of ``W + s B A`` depends on, for one device and dtype.

    Attributes:
        rows: Of the weight [elements].
        cols: Of the weight [elements].
        rank: Of the adapters.
        is_fused: True if the fused kernel computes it, else the device's ``addmm``.
    """

    rows: int
    cols: int
    rank: int
    is_fused: bool = True

    @property
    def pair(self) -> tuple[MergeShape, MergeShape]:
        """The same merge both ways, the fused one first: their times are compared."""
        return self._replace(is_fused=True), self._replace(is_fused=False)


#: What a measured time is filed under.
Shape: TypeAlias = GemmShape | MergeShape


@dataclass(frozen=True)
class Merge:
    """``W + s B A`` by one kernel, which reads W (rows, cols) once and writes the sum once.

    Attributes:
        rows: Of W [elements].
        cols: Of W [elements].
        rank: Columns of B.
        itemsize: Element width [B].
    """

    rows: Amount
    cols: Amount
    rank: Amount
    itemsize: int

    @property
    def cost(self) -> Cost:
        """2 rows cols rank FLOP; W and both adapters read, the sum written; 1 kernel."""
        size = self.rows * self.cols
        return Cost(
            {
                "flops.nn": 2 * size * self.rank,
                "read": (size + self.rank * (self.rows + self.cols)) * self.itemsize,
                "written": size * self.itemsize,
                "launches": 1,
            }
        )

    @property
    def shape(self) -> MergeShape:
        """What a measurement of it is filed under; its dimensions have to be integers."""
        return MergeShape(int(self.rows), int(self.cols), int(self.rank))


@dataclass(frozen=True)
class Add:
    """The elementwise sum of ``operands`` matrices (b, m, n).

    Inductor fuses a sum into its neighbours, or into the accumulator of a product, so it costs no
    launch. Every addition has the same price, so nested sums cost as much as the flat sum that
    emission writes.

    Attributes:
        b: Batch [matrices].
        m: Rows [elements].
        n: Columns [elements].
        operands: Matrices that are added up.
        itemsize: Element width [B].
    """

    b: Amount
    m: Amount
    n: Amount
    operands: int
    itemsize: int

    @property
    def cost(self) -> Cost:
        """Elementwise = 3 b m n (operands - 1) itemsize [B]."""
        moved = 3 * self.b * self.m * self.n * (self.operands - 1) * self.itemsize
        return Cost({"elementwise": moved})


@dataclass(frozen=True)
class Elementwise:
    """Arithmetic that Inductor fuses into its neighbours: a scaling, a reduction.

    Attributes:
        moved: What it reads and writes [B].
    """

    moved: Amount

    @property
    def cost(self) -> Cost:
        """Elementwise = moved [B]; no launch of its own."""
        return Cost({"elementwise": self.moved})


@dataclass(frozen=True)
class Gather:
    """Matrices that are picked from a stack, one for each token, and that products read.

    On a GPU a kernel writes them, and the products read them. On a CPU Inductor multiplies single
    rows by the matrices in their places in the stack, so there a pick takes no time.

    Attributes:
        moved: What it reads and writes [B].
    """

    moved: Amount

    @property
    def cost(self) -> Cost:
        """Picked = moved [B]; no launch of its own."""
        return Cost({"picked": self.moved})


@dataclass(frozen=True)
class Launches:
    """Kernels whose bytes do not count, such as scalings of low-rank matrices.

    Attributes:
        count: How many.
    """

    count: int

    @property
    def cost(self) -> Cost:
        """Launches = count."""
        return Cost({"launches": self.count})


@dataclass(frozen=True)
class GroupedMatMul:
    """Products of all tokens with the matrices (rows, cols) of their experts, in one operator.

    Attributes:
        tokens: Tokens [rows].
        experts: Matrices.
        rows: Rows of each [elements].
        cols: Columns of each [elements].
        itemsize: Element width [B].
        is_outer: True if the matrices are the result: for each expert the sum over its tokens of a
            column times a row. Otherwise each token's row is multiplied by its expert's matrix.
        turned: True if the matrices are stored transposed.
    """

    tokens: Amount
    experts: Amount
    rows: Amount
    cols: Amount
    itemsize: int
    is_outer: bool = False
    turned: bool = False

    @property
    def cost(self) -> Cost:
        """2 tokens rows cols FLOP; the tokens' vectors and all matrices moved; 1 kernel."""
        stack = self.experts * self.rows * self.cols
        ends = self.tokens * (self.rows + self.cols)
        read = ends if self.is_outer else self.tokens * self.rows + stack
        written = stack if self.is_outer else self.tokens * self.cols
        return Cost(
            {
                _FLOPS[self.is_outer, self.turned]: 2 * self.tokens * self.rows * self.cols,
                "read": read * self.itemsize,
                "written": written * self.itemsize,
                "launches": 1,
            }
        )


@dataclass(frozen=True)
class Convolution:
    """A convolution, or the gradient of its images or weight, as a product (m, k) @ (k, n).

    One of the three dimensions is that of positions, over all images.

    Attributes:
        m: Rows of the result [elements].
        k: Contracted dimension [elements].
        n: Columns of the result [elements].
        itemsize: Element width [B].
        read: What both operands have in memory [elements]. Overlapping patches count once.
        written: What the result has in memory [elements].
    """

    m: Amount
    k: Amount
    n: Amount
    itemsize: int
    read: Amount
    written: Amount

    @property
    def cost(self) -> Cost:
        """2 m k n FLOP; operands and result moved; 1 kernel."""
        return Cost(
            {
                "flops.nn": 2 * self.m * self.k * self.n,
                "read": self.read * self.itemsize,
                "written": self.written * self.itemsize,
                "launches": 1,
            }
        )


@dataclass(frozen=True)
class Hold:
    """A matrix (b, m, n) held from the forward to the backward.

    Attributes:
        b: Batch [matrices].
        m: Rows [elements].
        n: Columns [elements].
        itemsize: Element width [B].
    """

    b: Amount
    m: Amount
    n: Amount
    itemsize: int

    @property
    def cost(self) -> Cost:
        """Held = b m n itemsize [B]."""
        return Cost({"held": self.b * self.m * self.n * self.itemsize})


Operation: TypeAlias = (
    MatMul
    | UpcastMatMul
    | Merge
    | Add
    | Elementwise
    | Gather
    | Launches
    | GroupedMatMul
    | Convolution
    | Hold
)
