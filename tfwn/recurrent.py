"""Recurrent layers: a cell in a loop over time."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, TypedDict

import tensorflow as tf

from tfwn.layer import Layer, refuse_initialization
from tfwn.recurrent_cells import Cell, GRUCell, LSTMCell, RecurrentOptions, SimpleRNNCell

if TYPE_CHECKING:
    from typing_extensions import Unpack


class LoopOptions(TypedDict, total=False):
    """Keyword arguments of `tfwn.RNN`, common to all recurrent layers."""

    return_sequences: bool
    return_state: bool
    go_backwards: bool
    unroll: bool
    name: str | None


class SimpleRNNOptions(RecurrentOptions, LoopOptions, total=False):
    """Keyword arguments of `tfwn.SimpleRNN`; see `tfwn.SimpleRNNCell` and `tfwn.RNN`."""


class LSTMOptions(SimpleRNNOptions, total=False):
    """Keyword arguments of `tfwn.LSTM`; see `tfwn.LSTMCell` and `tfwn.RNN`."""

    unit_forget_bias: bool
    peepholes: bool
    peephole_initializer: Any


class GRUOptions(SimpleRNNOptions, total=False):
    """Keyword arguments of `tfwn.GRU`; see `tfwn.GRUCell` and `tfwn.RNN`."""

    reset_after: bool


def _split(options: Any) -> tuple[dict[str, Any], dict[str, Any]]:
    """Splits the options into those of the cell and those of the loop."""
    loop = {name: options.pop(name) for name in LoopOptions.__annotations__ if name in options}
    return options, loop


class RNN(Layer):
    """Runs a cell over time, h_t = cell(x_t, h_{t-1}), computing w (eq. 2) once before the loop.

    Arguments:
      cell: a `tfwn.SimpleRNNCell`, `tfwn.LSTMCell` or `tfwn.GRUCell`.
      return_sequences: whether to return the outputs of all time steps instead of only the last.
      return_state: whether to return the final states as well.
      go_backwards: whether to process the sequence in reverse; the outputs then have this order.
      unroll: whether to build a graph of all steps instead of a loop. Suitable for few steps; their
        number must be known. A folded layer then converts to TensorFlow Lite.
      name: name of the layer.

    Raises:
      ValueError: if the cell is of another type, the inputs do not have rank 3, `unroll` is set and
        the number of steps is unknown, or the mask's shape or the number of states is wrong.
      RuntimeError: if data-dependent initialization reaches the layer.

    Inputs have shape [batch, time, in]. Outputs have shape [batch, units], or [batch, time, units]
    with return_sequences, in the cell's compute_dtype.

    >>> layer = tfwn.RNN(tfwn.GRUCell(4), return_sequences=True, return_state=True)
    >>> output, h = layer(tf.ones([8, 5, 3]))
    >>> output.shape, h.shape
    (TensorShape([8, 5, 4]), TensorShape([8, 4]))
    """

    def __init__(
        self,
        cell,
        return_sequences=False,
        return_state=False,
        go_backwards=False,
        unroll=False,
        *,
        name=None,
    ):
        super().__init__(name=name)
        if not isinstance(cell, Cell):
            raise ValueError(
                "cell must be a tfwn.SimpleRNNCell, tfwn.LSTMCell or tfwn.GRUCell, got "
                f"{type(cell).__module__}.{type(cell).__name__}"
            )
        self.cell = cell
        self.return_sequences = return_sequences
        self.return_state = return_state
        self.go_backwards = go_backwards
        self.unroll = unroll

    def __call__(self, sequences, initial_state=None, mask=None):
        """Returns the output or, with return_state, a tuple of the output and the final states.

        Arguments:
          sequences: x [batch, time, in], cast to the cell's compute_dtype.
          initial_state: list of [batch, units], one for each of the cell's states. Default: zeros.
          mask: [batch, time], False or 0 for steps to skip. A skipped step leaves the states
            unchanged and repeats the output of the previous step (0 before the first).
        """
        refuse_initialization(self)
        cell = self.cell
        x = tf.cast(sequences, cell.compute_dtype)
        if x.shape.rank != 3:
            raise ValueError(f"inputs of {self.name!r} must have rank 3, got shape {x.shape}")
        if self.unroll and x.shape[1] is None:
            raise ValueError(
                f"unroll=True needs a known number of steps, got shape {x.shape}: set it with "
                "tf.ensure_shape"
            )
        self.build(x.shape)
        batch, steps = (n if n is not None else tf.shape(x)[i] for i, n in enumerate(x.shape[:2]))
        zeros = cell.get_initial_state(batch)
        states = zeros if initial_state is None else cell.check_states(initial_state)

        weights = cell.effective_weights()
        projected = self._in_order(cell.project(tf.transpose(x, [1, 0, 2]), weights))
        masks = None if mask is None else self._in_order(self._time_major(mask, x.shape))

        def step(projected, mask, output, states):
            new_output, new_states = cell.step(projected, states, weights)
            if mask is not None:
                new_output = tf.where(mask, new_output, output)
                new_states = [
                    tf.where(mask, new, old) for new, old in zip(new_states, states, strict=True)
                ]
            return new_output, new_states

        run = self._unrolled if self.unroll and steps else self._loop
        output, states = run(step, steps, projected, masks, zeros[0], states)
        if self.return_sequences:
            # Without the reshape, a stack of no steps would have an unknown shape.
            output = tf.transpose(tf.reshape(output, [steps, batch, cell.units]), [1, 0, 2])
        output = tf.ensure_shape(output, [*x.shape[: output.shape.rank - 1], cell.units])
        return (output, *states) if self.return_state else output

    def _unrolled(self, step, steps, projected, masks, output, states):
        """Returns the outputs (time-major) or only the last one, and the final states."""
        outputs = []
        all_masks = [None] * steps if masks is None else tf.unstack(masks, steps)
        for projected_t, mask in zip(tf.unstack(projected, steps), all_masks, strict=True):
            output, states = step(projected_t, mask, output, states)
            outputs.append(output)
        return tf.stack(outputs) if self.return_sequences else output, states

    def _loop(self, step, steps, projected, masks, output, states):
        """Like `_unrolled`, but with a tf.while_loop."""
        by_time = _array(projected, steps)
        masks_by_time = None if masks is None else _array(masks, steps)
        units = output.shape[-1]
        outputs: tuple[tf.TensorArray, ...] = ()
        if self.return_sequences:
            outputs = (tf.TensorArray(output.dtype, steps, element_shape=[None, units]),)

        def body(time, outputs, output, *states):
            mask = None if masks_by_time is None else masks_by_time.read(time)
            output, states = step(by_time.read(time), mask, output, states)
            outputs = tuple(array.write(time, output) for array in outputs)
            return time + 1, outputs, output, *states

        any_batch = [tf.TensorShape([None, units])] * (len(states) + 1)
        _, outputs, output, *states = tf.while_loop(
            lambda time, *_: time < steps,
            body,
            (0, outputs, output, *states),
            shape_invariants=(
                tf.TensorShape([]),
                (tf.TensorShape(None),) * len(outputs),
                *any_batch,
            ),
            maximum_iterations=steps,
        )
        return outputs[0].stack() if outputs else output, states

    def _initialize(self, input_shape):
        self.cell.build(input_shape)

    def _in_order(self, values):
        return tf.reverse(values, [0]) if self.go_backwards else values

    def _time_major(self, mask, shape):
        mask = tf.cast(mask, tf.bool)
        if not mask.shape.is_compatible_with(shape[:2]):
            raise ValueError(f"mask must have shape [batch, time] = {shape[:2]}, got {mask.shape}")
        return tf.transpose(tf.ensure_shape(mask, shape[:2]))[:, :, tf.newaxis]


def _array(values, steps) -> tf.TensorArray:
    return tf.TensorArray(values.dtype, steps, element_shape=values.shape[1:]).unstack(values)


class SimpleRNN(RNN):
    """Simple recurrent layer: runs a `tfwn.SimpleRNNCell` (eq. 2) over time in a `tfwn.RNN`.

    Arguments:
      units, activation, use_bias, options: see `tfwn.SimpleRNNCell`.
      return_sequences, return_state, go_backwards, unroll, name: see `tfwn.RNN`.

    Raises:
      ValueError, RuntimeError: as for `tfwn.SimpleRNNCell` and `tfwn.RNN`.

    >>> tfwn.SimpleRNN(4)(tf.ones([8, 5, 3])).shape
    TensorShape([8, 4])
    """

    def __init__(
        self,
        units,
        activation="tanh",
        use_bias=True,
        **options: Unpack[SimpleRNNOptions],
    ):
        of_cell, of_loop = _split(options)
        cell = SimpleRNNCell(units, activation, use_bias, **of_cell)
        super().__init__(cell, **of_loop)


class LSTM(RNN):
    """Long short-term memory: runs a `tfwn.LSTMCell` (eq. 2) over time in a `tfwn.RNN`.

    Arguments:
      units, activation, recurrent_activation, use_bias, unit_forget_bias, peepholes,
        peephole_initializer, options: see `tfwn.LSTMCell`.
      return_sequences, return_state, go_backwards, unroll, name: see `tfwn.RNN`.

    Raises:
      ValueError, RuntimeError: as for `tfwn.LSTMCell` and `tfwn.RNN`.

    >>> layer = tfwn.LSTM(4, return_sequences=True)
    >>> ids = tf.constant([[3, 1, 0, 0]])
    >>> layer(tf.one_hot(ids, 5), mask=ids != 0).shape
    TensorShape([1, 4, 4])
    """

    def __init__(
        self,
        units,
        activation="tanh",
        recurrent_activation="sigmoid",
        use_bias=True,
        **options: Unpack[LSTMOptions],
    ):
        of_cell, of_loop = _split(options)
        cell = LSTMCell(units, activation, recurrent_activation, use_bias, **of_cell)
        super().__init__(cell, **of_loop)


class GRU(RNN):
    """Gated recurrent unit: runs a `tfwn.GRUCell` (eq. 2) over time in a `tfwn.RNN`.

    Arguments:
      units, activation, recurrent_activation, use_bias, reset_after, options: see `tfwn.GRUCell`.
      return_sequences, return_state, go_backwards, unroll, name: see `tfwn.RNN`.

    Raises:
      ValueError, RuntimeError: as for `tfwn.GRUCell` and `tfwn.RNN`.

    >>> output, h = tfwn.GRU(4, return_state=True)(tf.ones([8, 5, 3]))
    >>> output.shape, h.shape
    (TensorShape([8, 4]), TensorShape([8, 4]))
    """

    def __init__(
        self,
        units,
        activation="tanh",
        recurrent_activation="sigmoid",
        use_bias=True,
        **options: Unpack[GRUOptions],
    ):
        of_cell, of_loop = _split(options)
        cell = GRUCell(units, activation, recurrent_activation, use_bias, **of_cell)
        super().__init__(cell, **of_loop)
