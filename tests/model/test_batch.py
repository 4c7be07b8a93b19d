"""The index tensors of a batch, against the sequences written out by hand."""

import torch

from ship_ds.model.batch import Layout, RowGroups, TokenBatch, from_one_buffer, in_one_buffer


def _batch() -> TokenBatch:
    """Two rows: virtual, virtual, instruction 9, prompt 5 6, target 7; and prompt 3, target 1 2."""
    return TokenBatch.build([[5, 6], [3]], [[7], [1, 2]], 0, 2, instructions=[[9], []])


def test_a_batch_says_where_everything_is() -> None:
    batch = _batch()
    assert batch.ids_ES.tolist() == [[0, 0, 9, 5, 6, 7], [0, 0, 3, 1, 2, 0]]
    assert batch.lengths == (6, 5) and batch.lengths_E.tolist() == [6, 5]
    assert batch.labels_K.tolist() == [7, 1, 2] and batch.label_row_K.tolist() == [0, 1, 1]
    assert batch.padded.row_K.tolist() == [0, 1, 1]
    assert batch.padded.column_K.tolist() == [4, 2, 3]
    assert batch.packed.source_N.tolist() == [0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10]
    assert batch.packed.position_N.tolist() == [0, 1, 2, 3, 4, 5, 0, 1, 2, 3, 4]
    assert batch.packed.ends.tolist() == [0, 6, 11] and batch.packed.ends.dtype == torch.int32
    assert batch.packed.predicts_K.tolist() == [4, 8, 9]
    assert batch.packed.last_E.tolist() == [5, 10]
    assert batch.packed.virtual_X.tolist() == [0, 1, 6, 7]
    assert batch.instruction_X.tolist() == batch.packed.instruction_X.tolist() == [2]
    assert (batch.num_targets, batch.num_tokens) == (3, 11)
    offsets = batch.task_offsets(2)
    assert offsets is not None and offsets.tolist() == [6, 11]
    assert batch.task_offsets(1) is None, "one task has as many tokens as every other"
    assert batch.real_ES.sum(1).tolist() == [6, 5]


def test_hidden_labels_are_read_as_another_token_and_stay_labels() -> None:
    batch = _batch()
    hidden = batch.hiding(torch.tensor([True, False, True]), 99)
    assert hidden.ids_ES.tolist() == [[0, 0, 9, 5, 6, 99], [0, 0, 3, 1, 99, 0]]
    assert hidden.labels_K.tolist() == [7, 1, 2]
    assert batch.ids_ES.tolist() == _batch().ids_ES.tolist(), "the batch itself has changed"
    assert hidden.packed is batch.packed and hidden.lengths == batch.lengths


def test_packed_tokens_skip_the_padding_between_rows() -> None:
    batch = TokenBatch.build([[3], [5, 6, 4]], [[1], [7]], 0)
    assert batch.packed.source_N.tolist() == [0, 1, 4, 5, 6, 7]
    assert batch.ids_ES.flatten()[batch.packed.source_N].tolist() == [3, 1, 5, 6, 4, 7]


def test_packed_states_become_rows_with_zeros() -> None:
    states_NH = torch.arange(1.0, 9.0).view(4, 2)
    unequal, equal = (TokenBatch.build(rows, None, 9) for rows in ([[3], [5, 6, 4]], [[3, 1]] * 2))
    assert unequal.has_padding and not equal.has_padding
    assert unequal.in_rows(states_NH).tolist() == [
        [[1, 2], [0, 0], [0, 0]],
        [[3, 4], [5, 6], [7, 8]],
    ]
    assert equal.in_rows(states_NH).tolist() == [[[1, 2], [3, 4]], [[5, 6], [7, 8]]]


def test_prompts_alone_have_no_labels() -> None:
    batch = TokenBatch.build([[5, 6], [3]], None, 0)
    assert batch.num_targets == 0 and batch.labels_K.shape == (0,)
    assert batch.padded.column_K.shape == (0,) and batch.packed.predicts_K.shape == (0,)


def test_a_batch_of_lengths_has_the_shapes_of_one_with_texts() -> None:
    texts = TokenBatch.build([[5, 6, 4]] * 3, [[1, 2]] * 3, 0, 4)
    shapes = TokenBatch.of_lengths(3, 3, 2, 4)
    assert shapes.ids_ES.is_meta and shapes.packed.ends.is_meta and shapes.padded.column_K.is_meta
    assert shapes.ids_ES.shape == texts.ids_ES.shape
    assert shapes.padded.column_K.shape == texts.padded.column_K.shape
    assert shapes.packed.source_N.shape == texts.packed.source_N.shape
    assert (shapes.num_tokens, shapes.num_targets) == (texts.num_tokens, texts.num_targets)


def test_a_batch_is_built_on_the_host_whatever_the_default_device() -> None:
    with torch.device("meta"):
        built, shapes = _batch(), TokenBatch.of_lengths(2, 3, 1)
    assert not built.ids_ES.is_meta and built.labels_K.tolist() == [7, 1, 2]
    assert shapes.ids_ES.is_meta and shapes.num_tokens == 8


def test_rows_of_about_one_length_share_a_group() -> None:
    rows = RowGroups.of([5, 9, 8, 4])
    assert rows.groups == ((2, 9), (2, 5)) and rows.row_E.tolist() == [1, 2, 0, 3]
    starts = {1: 0, 2: 9, 0: 18, 3: 23}
    expected = [starts[e] + i for e, length in enumerate([5, 9, 8, 4]) for i in range(length)]
    assert rows.place_N.tolist() == expected
    assert RowGroups.of([6] * 5).groups == ((5, 6),)


def test_batches_end_to_end_are_one_layout() -> None:
    """Of five rows as of three and two, but that each batch keeps its own groups."""
    ids = [[7] * length for length in (5, 9, 8, 4, 6)]
    first, second = (TokenBatch.build(rows, None, 0) for rows in (ids[:3], ids[3:]))
    layout, whole = Layout.of([first, second]), Layout.of([TokenBatch.build(ids, None, 0)])
    assert torch.equal(layout.ends, whole.ends) and layout.ends.dtype == torch.int32
    assert torch.equal(layout.position_N, whole.position_N)
    assert layout.longest == whole.longest == 9
    rows = layout.rows
    assert rows.groups == (*first.packed.rows.groups, *second.packed.rows.groups)
    assert rows.row_E.tolist() == [1, 2, 0, 4, 3]
    # Row 4 is the longest of the second batch, whose rows begin after those of the first.
    start = sum(count * width for count, width in first.packed.rows.groups)
    assert rows.place_N[22:].tolist() == [start + 6 + n for n in range(4)] + [
        start + n for n in range(6)
    ]
    assert Layout.of([first]).rows is first.packed.rows


def test_tensors_of_a_batch_travel_in_one_buffer() -> None:
    batch = _batch()
    tensors = [*batch._tensors(), torch.tensor([True, False, True]), torch.randn(3, 5)]
    views = from_one_buffer(in_one_buffer(tensors).clone(), tensors)
    assert len({view.untyped_storage().data_ptr() for view in views}) == 1
    assert all(view.data_ptr() % 16 == 0 for view in views)
    for view, tensor in zip(views, tensors, strict=True):
        assert view.dtype == tensor.dtype and torch.equal(view, tensor)
    again = batch._with(iter(views))
    assert again.packed.rows.groups == batch.packed.rows.groups and again.lengths == batch.lengths
    assert torch.equal(again.packed.rows.place_N, batch.packed.rows.place_N)
