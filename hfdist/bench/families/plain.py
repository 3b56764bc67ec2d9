"""Families that need nothing but torch: graphs, Fourier operators, experts, recurrence, attention."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from hfdist.bench.families.family import Family, mse, normal
from hfdist.bench.workloads import CausalTransformer

N = 5


class GraphConvolution(nn.Module):
    """Two rounds of sums over neighbours on a ring with a chord, divided by the number of neighbours."""

    source, target = (0, 1, 2, 3, 4, 0), (1, 2, 3, 4, 0, 2)

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(3, 6), nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        source, target = torch.tensor(self.source), torch.tensor(self.target)
        degrees = x.new_zeros(len(x)).index_add_(0, target, x.new_ones(len(target)))

        def gathered(h: Tensor) -> Tensor:
            sums = torch.zeros_like(h).index_add_(0, target, h[source])
            return h + sums / degrees.clamp(min=1)[:, None]

        return self.second(torch.relu(gathered(self.first(gathered(x)))))


class GraphAttention(nn.Module):
    """A softmax over each node's neighbours by scatter operations."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(3, 4), nn.Linear(4, 3)
        self.score = nn.Parameter(torch.randn(8))

    def forward(self, x: Tensor) -> Tensor:
        source = torch.tensor(GraphConvolution.source)
        target = torch.tensor(GraphConvolution.target)
        h = self.first(x)
        e = F.leaky_relu(torch.cat([h[source], h[target]], 1) @ self.score, 0.2)
        most = e.new_full((len(x),), -torch.inf).scatter_reduce(0, target, e, "amax")
        weight = (e - most[target]).exp()
        total = e.new_zeros(len(x)).scatter_add_(0, target, weight)
        messages = h[source] * (weight / total[target])[:, None]
        return self.second(torch.tanh(h + torch.zeros_like(h).index_add_(0, target, messages)))


class FourierOperator(nn.Module):
    """A Fourier neural operator in one dimension: low modes are mixed, the rest is cut off."""

    modes, width = 3, 4

    def __init__(self) -> None:
        super().__init__()
        self.lift, self.project = nn.Linear(1, self.width), nn.Linear(self.width, 1)
        self.skip = nn.Conv1d(self.width, self.width, 1)
        self.weight = nn.Parameter(0.3 * torch.randn(self.width, self.width, self.modes, 2))

    def forward(self, x: Tensor) -> Tensor:  # [N, length]
        h = self.lift(x[..., None]).transpose(1, 2)  # [N, width, length]
        modes = torch.fft.rfft(h)
        mixed = torch.zeros_like(modes)
        weight = torch.view_as_complex(self.weight.contiguous())
        low = slice(0, self.modes)
        mixed[..., low] = torch.einsum("nik,iok->nok", modes[..., low], weight)
        h = F.gelu(torch.fft.irfft(mixed, n=x.shape[1]) + self.skip(h))
        return self.project(h.transpose(1, 2)).squeeze(-1)


class MixtureOfExperts(nn.Module):
    """Two of four experts a row; their weights are normalised in place, as Mixtral's router does."""

    def __init__(self) -> None:
        super().__init__()
        self.router = nn.Linear(3, 4)
        self.experts = nn.ModuleList(
            nn.Sequential(nn.Linear(3, 4), nn.SiLU(), nn.Linear(4, 3)) for _ in range(4)
        )

    def forward(self, x: Tensor) -> Tensor:
        weights, chosen = self.router(x).softmax(1).topk(2, 1)
        weights /= weights.sum(1, keepdim=True)
        out = torch.zeros_like(x)
        for k, expert in enumerate(self.experts):
            rows, places = torch.where(chosen == k)
            out.index_add_(0, rows, expert(x[rows]) * weights[rows, places, None])
        return out


class Recurrent(nn.Module):
    def __init__(self, kind: Callable[..., nn.RNNBase], layers: int = 1) -> None:
        super().__init__()
        self.rnn = kind(3, 4, num_layers=layers, batch_first=True, bidirectional=True)
        self.head = nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.rnn(x)[0][:, -1])


class Encoder(nn.Module):
    """nn.TransformerEncoder on padded tokens."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(7, 4)
        layer = nn.TransformerEncoderLayer(4, 2, 6, dropout=0.1, batch_first=True)
        self.encoder = nn.TransformerEncoder(layer, 2)
        self.head = nn.Linear(4, 3)

    def forward(self, ids: Tensor) -> Tensor:
        h = self.encoder(self.embedding(ids), src_key_padding_mask=ids == 0)
        return self.head(torch.nan_to_num(h))


class OrdinaryDifferentialEquation(nn.Module):
    """A vector field, integrated by four Runge-Kutta steps."""

    def __init__(self) -> None:
        super().__init__()
        self.field = nn.Sequential(nn.Linear(3, 5), nn.Tanh(), nn.Linear(5, 3))

    def forward(self, x: Tensor) -> Tensor:
        h = 0.25
        for _ in range(4):
            k1 = self.field(x)
            k2 = self.field(x + h / 2 * k1)
            k3 = self.field(x + h / 2 * k2)
            k4 = self.field(x + h * k3)
            x = x + h / 6 * (k1 + 2 * k2 + 2 * k3 + k4)
        return x


class VariationalAutoencoder(nn.Module):
    """Draws its code: the same one in every evaluation of a step."""

    def __init__(self) -> None:
        super().__init__()
        self.encode, self.decode = nn.Linear(3, 4), nn.Linear(2, 3)

    def forward(self, x: Tensor) -> Tensor:
        mean, log_scale = self.encode(x).chunk(2, 1)
        return self.decode(mean + torch.randn_like(mean) * log_scale.exp())


class StateSpace(nn.Module):
    """A diagonal linear recurrence with complex poles, applied as a convolution by Fourier transforms."""

    def __init__(self) -> None:
        super().__init__()
        self.log_decay, self.frequency = nn.Parameter(torch.randn(4)), nn.Parameter(torch.randn(4))
        self.read = nn.Parameter(torch.randn(4, 2))

    def forward(self, x: Tensor) -> Tensor:  # [N, length]
        length = x.shape[1]
        poles = torch.complex(-self.log_decay.exp(), self.frequency)
        powers = torch.exp(poles[:, None] * torch.arange(length, dtype=x.dtype))
        kernel = (torch.view_as_complex(self.read)[:, None] * powers).sum(0).real
        spectrum = torch.fft.rfft(x, n=2 * length) * torch.fft.rfft(kernel, n=2 * length)
        return torch.fft.irfft(spectrum, n=2 * length)[:, :length]


class UNet(nn.Module):
    """Down by strided convolutions, up by interpolation and transposed ones, with a skip connection."""

    def __init__(self) -> None:
        super().__init__()
        self.inward = nn.Conv2d(1, 3, 3, padding=1, padding_mode="circular")
        self.down = nn.Conv2d(3, 4, 3, stride=2, padding=1)
        self.norm = nn.GroupNorm(2, 4)
        self.up = nn.ConvTranspose2d(4, 3, 2, stride=2)
        self.outward = nn.Conv2d(7, 1, 1)

    def forward(self, x: Tensor) -> Tensor:
        h = torch.relu_(self.inward(x))
        low = F.silu(self.norm(self.down(h)), inplace=True)
        high = F.interpolate(low, scale_factor=2, mode="bilinear")
        return self.outward(torch.cat([self.up(low), high], 1) + F.pad(h, (0, 0, 0, 0, 0, 4)))


def families() -> list[Family]:
    """In the order of the table."""

    def rows() -> tuple[Tensor, Tensor]:
        return normal(N, 3), torch.randint(3, (N,))

    def sequences() -> tuple[Tensor, Tensor]:
        return normal(N, 4, 3), torch.randint(3, (N,))

    def tokens() -> tuple[Tensor, Tensor]:
        return torch.randint(1, 7, (3, 4)), torch.randint(7, (3, 4))

    def padded() -> tuple[Tensor, Tensor]:
        return torch.tensor([[3, 1, 4, 1], [5, 2, 0, 0], [6, 5, 3, 0]]), torch.randint(3, (3, 4))

    def perceptron() -> nn.Module:
        return nn.Sequential(nn.Linear(3, 6), nn.Tanh(), nn.Linear(6, 3))

    def convolutions() -> nn.Module:
        return nn.Sequential(
            nn.Conv2d(1, 3, 3), nn.BatchNorm2d(3), nn.ReLU(inplace=True), nn.MaxPool2d(2),
            nn.Flatten(), nn.Dropout(0.2), nn.Linear(12, 3),
        )  # fmt: skip

    def pictures() -> tuple[Tensor, Tensor]:
        return normal(N, 1, 6, 6), torch.randint(3, (N,))

    return [
        Family(name="perceptron", source="torch", model=perceptron, batch=rows),
        Family(name="convolutions, batch norm and dropout in training", source="torch",
               model=convolutions, batch=pictures, training=True),
        Family(name="U-net", source="torch", model=UNet, criterion=mse,
               batch=lambda: (normal(2, 1, 4, 4), normal(2, 1, 4, 4))),
        Family(name="RNN", source="torch", model=lambda: Recurrent(nn.RNN), batch=sequences),
        Family(name="GRU", source="torch", model=lambda: Recurrent(nn.GRU), batch=sequences),
        Family(name="LSTM, two layers", source="torch", model=lambda: Recurrent(nn.LSTM, 2),
               batch=sequences),
        Family(name="state space model", source="torch", model=StateSpace, criterion=mse,
               batch=lambda: (normal(3, 6), normal(3, 6))),
        Family(name="transformer encoder, padded, evaluation", source="torch", model=Encoder,
               batch=padded),
        Family(name="transformer encoder, padded, training", source="torch", model=Encoder,
               batch=padded, training=True),
        Family(name="causal transformer, tied embedding", source="torch", batch=tokens,
               model=lambda: CausalTransformer(7, 4, 1, 2, 4)),
        Family(name="mixture of experts", source="torch", model=MixtureOfExperts, batch=rows),
        Family(name="graph convolution", source="torch", model=GraphConvolution, batch=rows),
        Family(name="graph attention", source="torch", model=GraphAttention, batch=rows),
        Family(name="Fourier neural operator", source="torch", model=FourierOperator,
               criterion=mse, batch=lambda: (normal(3, 8), normal(3, 8))),
        Family(name="neural differential equation", source="torch", criterion=mse,
               model=OrdinaryDifferentialEquation, batch=lambda: (normal(N, 3), normal(N, 3))),
        Family(name="variational autoencoder", source="torch", model=VariationalAutoencoder,
               criterion=mse, batch=lambda: (normal(N, 3), normal(N, 3)), training=True),
    ]  # fmt: skip
