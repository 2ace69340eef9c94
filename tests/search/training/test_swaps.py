"""Moving widths of a trained network: what stays, what changes, where bytes go."""

import numpy as np

from quant_ops.quantized import QuantizedLayer
from quant_ops.stored import StoredBias, StoredScale
from search.training.swaps import _around, merged


def layer_of(widths, scales, biases, codes):
    scales = np.asarray(scales, float)
    stored = {
        w: StoredScale.nearest(scales[np.asarray(widths) == w][:, None])
        for w in sorted(set(widths))
    }
    bias = StoredBias.nearest(np.asarray(biases, float))
    return QuantizedLayer(
        tuple(widths), np.asarray(codes, np.int16), stored, frozenset(), None, bias
    )


def test_channels_that_keep_their_width_keep_codes_and_scales():
    old = layer_of((2, 2, 3), (0.5, 0.25, 0.125), (1.0, -1.0, 0.5), [[1, 0], [-1, 1], [3, 2]])
    new = layer_of((2, 3, 3), (0.9, 0.1, 0.9), (0.1, 0.2, 0.3), [[0, 0], [2, -3], [0, 0]])
    found = merged(old, new)
    assert found.bit_widths == (2, 3, 3)
    assert found.codes.tolist() == [[1, 0], [2, -3], [3, 2]]
    scales = found.channel_scales()[:, 0]
    assert scales[[0, 2]].tolist() == old.channel_scales()[[0, 2], 0].tolist()
    assert abs(scales[1] / 0.1 - 1) < 0.02
    np.testing.assert_allclose(found.bias.values, [1.0, 0.2, 0.5], atol=1e-4)


def test_one_step_to_either_side_with_losses_that_do_not_rise():
    widths, losses = _around([1, 1.6, 2, 3], 1.6, np.array([9.0, 4.0, 5.0, 1.0]))
    assert widths.tolist() == [1, 1.6, 2]
    assert losses.tolist() == [9.0, 4.0, 4.0]
    assert _around([2, 4], 2, np.array([3.0, 1.0]))[0].tolist() == [2, 4]
