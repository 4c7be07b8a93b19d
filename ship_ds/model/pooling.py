"""Learned queries that gather from all states of a text (PMA of Lee et al. 2019, arXiv 1810.00825).

    weights of a query's head    softmax over the real tokens of  w . state / sqrt(H)     w learned
    what it gathers              its share of the states, summed by these weights

A head compares the whole state: w is what a query and a projection of the keys come to, one vector.
Values are the states themselves, and the layer after them mixes what the heads gathered, so there
is no projection for them either. Zero weights give the mean.

Letters: E sequences, S padded length, H hidden size, Q learned queries, A attention heads,
X other letters flattened.
"""

from torch import Tensor, nn

from ship_ds.errors import UserError
from ship_ds.model.adapters.adapter import num_products


class LearnedQueries(nn.Module):
    """Q queries of A heads each: states (E, S, H) -> (E, Q H).

    Attributes:
        width: Q H, of what all queries gather of one text.
    """

    def __init__(self, hidden_size: int, num_queries: int, num_heads: int) -> None:
        """Draw the queries.

        Args:
            hidden_size: H.
            num_queries: Q.
            num_heads: A.

        Raises:
            UserError: the heads have no equal shares.
        """
        super().__init__()
        if hidden_size % num_heads:
            raise UserError(
                f"model.encoder.pooling.num_heads ({num_heads}) must divide the base's hidden size "
                f"({hidden_size}): change it"
            )
        self.num_queries, self.num_heads = num_queries, num_heads
        self.width = num_queries * hidden_size
        # A linear, since ZeRO-3 gathers a weight at its module's forward.
        self.queries = nn.Linear(hidden_size, num_queries * num_heads, bias=False)
        # Scores of about unit size over normed states: each query reads other tokens from the
        # start. At zero all would gather the mean, which differs less from text to text.
        nn.init.normal_(self.queries.weight)

    @property
    def num_products(self) -> int:
        """Multiplications for one token: its scores, and its part of what each query gathers."""
        return num_products(self) + self.width

    def forward(self, states_ESH: Tensor, real_ES: Tensor) -> Tensor:
        """What each text's queries gather, side by side, (E, Q H).

        Args:
            states_ESH: finite in the padding, whose weight is zero.
            real_ES: True where a position is not padding.
        """
        weights_ESQA = self.weights(states_ESH, real_ES).unflatten(
            -1, (self.num_queries, self.num_heads)
        )
        shares = states_ESH.unflatten(-1, (self.num_heads, -1)).transpose(1, 2)
        gathered = weights_ESQA.to(states_ESH.dtype).permute(0, 3, 2, 1) @ shares
        return gathered.transpose(1, 2).flatten(1)

    def weights(self, states_ESH: Tensor, real_ES: Tensor) -> Tensor:
        """Of every position for each head of each query, (E, S, Q A), in fp32; 1 in sum."""
        scores_ESX = self.queries(states_ESH).float() * states_ESH.shape[-1] ** -0.5
        return scores_ESX.masked_fill(~real_ES[..., None], -float("inf")).softmax(1)
