"""LTAD's variational autoencoder of patch features, conditioned on text embeddings of classes."""

import torch
from torch import Tensor, nn


class ConditionalVAE(nn.Module):
    """Encodes patch features [B, L, d], given text embeddings [B, e] of their classes, as `latent` numbers each."""

    def __init__(self, channels: int, text: int, hidden: int = 512, latent: int = 64):
        super().__init__()
        self.encode = nn.Sequential(nn.Linear(channels + text, hidden), nn.ReLU(), nn.Linear(hidden, 2 * latent))
        self.decode = nn.Sequential(nn.Linear(latent + text, hidden), nn.ReLU(), nn.Linear(hidden, channels))

    def forward(self, features: Tensor, text: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """(decoded [B, L, d], mean, log variance [B, L, latent])."""
        mean, log_variance = self.encoded(features, text)
        return self.decoded(mean + (log_variance / 2).exp() * torch.randn_like(mean), text), mean, log_variance

    def encoded(self, features: Tensor, text: Tensor) -> tuple[Tensor, Tensor]:
        text = text[:, None].expand(-1, features.shape[1], -1)
        mean, log_variance = self.encode(torch.cat((features, text), -1)).to(features.dtype).chunk(2, -1)
        return mean, log_variance

    def decoded(self, codes: Tensor, text: Tensor) -> Tensor:
        text = text[:, None].expand(-1, codes.shape[1], -1)
        return self.decode(torch.cat((codes, text), -1)).to(codes.dtype)

    def between(self, features: Tensor, others: Tensor, text: Tensor, way: Tensor) -> Tensor:
        """f + D(μ + w · (μ' − μ)) − D(μ), [B, L, d]: features f, moved the way w [B] from their codes μ to others' μ'.

        D is the decoder. What the VAE does not encode of f stays.
        """
        (mean, _), (goal, _) = self.encoded(features, text), self.encoded(others, text)
        return features + self.decoded(torch.lerp(mean, goal, way[:, None, None]), text) - self.decoded(mean, text)
