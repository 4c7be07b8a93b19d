"""z cut into embeddings, the published "p-tuning" fusion: what has to fit."""

from ship_ds.errors import UserError


def check_reshape(key: str, num_tokens: int, latent_size: int, hidden_size: int) -> None:
    """See that z is exactly `num_tokens` embeddings of the base model.

    Args:
        key: the setting that says `num_tokens`, for the message.
        num_tokens: embeddings that z is cut into.
        latent_size: Z.
        hidden_size: of the base model.

    Raises:
        UserError: it is more or fewer numbers.
    """
    if num_tokens * hidden_size != latent_size:
        raise UserError(
            f"{key} ({num_tokens}) x the base's hidden size ({hidden_size}) is "
            f"{num_tokens * hidden_size}, and "
            f"model.latent_size is {latent_size}: z is reshaped, so make them equal"
        )
