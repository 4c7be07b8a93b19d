"""z cut into embeddings, the published "p-tuning" fusion: what has to fit."""

from ship_ds.errors import UserError


def check_reshape(key: str, num_tokens: int, latent_size: int, hidden_size: int) -> None:
    """Raises UserError unless z is exactly `num_tokens` embeddings of the base model."""
    if num_tokens * hidden_size != latent_size:
        raise UserError(
            f"{key} ({num_tokens}) x the base's hidden size ({hidden_size}) is "
            f"{num_tokens * hidden_size}, and "
            f"model.latent_size is {latent_size}: z is reshaped, so make them equal"
        )
