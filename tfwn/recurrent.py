"""Recurrent layers: the cells SimpleRNN, LSTM and GRU, and the loop over time."""

import tensorflow as tf

from tfwn.layer import Layer, check_positive, get_activation, refuse_initialization
from tfwn.weight import Weight, check_weight_options, initial_value


class _Cell(Layer):
    """What the cells share: a kernel for the input, one for the state, one step of time.

    A step is cut in two: `project`, x . w + b, which needs no state and so runs for all times at
    once, and `step`, the rest. The effective weights are arguments of both: computed once per call,
    outside the loop.
    """

    _gates: int
    _state_count = 1

    def __init__(
        self,
        units,
        activation="tanh",
        use_bias=True,
        *,
        kernel_initializer="glorot_uniform",
        recurrent_initializer="orthogonal",
        bias_initializer="zeros",
        name=None,
        **weight_options,
    ):
        super().__init__(name=name)
        self.units = check_positive("units", units)
        self.activation = get_activation(activation) or tf.identity
        self.use_bias = use_bias
        self.kernel_initializer = kernel_initializer
        self.recurrent_initializer = recurrent_initializer
        self.bias_initializer = bias_initializer
        self._weight_options = check_weight_options(**weight_options)
        self.dtype = self._weight_options["dtype"]
        self.compute_dtype = self._weight_options["compute_dtype"]
        self.b = None

    def __call__(self, inputs, states, weights=None) -> tuple[tf.Tensor, list[tf.Tensor]]:
        """Returns the output [batch, units] and the new states after one step of time.

        Arguments:
          inputs: [batch, in].
          states: list of [batch, units], as from `get_initial_state` or the last step.
          weights: `self.effective_weights()`, where the caller has it already, as in a loop.
        """
        refuse_initialization(self)
        x = tf.cast(inputs, self.compute_dtype)
        self.build(x.shape)
        states = self.check_states(states)
        weights = self.effective_weights() if weights is None else weights
        return self.step(self.project(x, weights), states, weights)

    def effective_weights(self) -> list[tf.Tensor]:
        """Returns w for the input and w for the state."""
        return [self.weight(), self.recurrent_weight()]

    def get_initial_state(self, batch_size) -> list[tf.Tensor]:
        """Returns zeros, one [batch_size, units] per state."""
        return [tf.zeros([batch_size, self.units], self.compute_dtype)] * self._state_count

    def check_states(self, states) -> list[tf.Tensor]:
        """The states as a list of tensors in compute_dtype; raises where their number is wrong."""
        states = list(states) if isinstance(states, list | tuple) else [states]
        if len(states) != self._state_count:
            raise ValueError(
                f"{type(self).__name__} needs {self._state_count} state(s) of shape "
                f"[batch, {self.units}], got {len(states)}"
            )
        return [tf.cast(state, self.compute_dtype) for state in states]

    def project(self, inputs, weights) -> tf.Tensor:
        """Returns x . w + b for inputs [..., in]."""
        projected = tf.tensordot(inputs, weights[0], 1)
        return projected + self._input_bias() if self.use_bias else projected

    def step(self, projected, states, weights) -> tuple[tf.Tensor, list[tf.Tensor]]:
        """Returns output and new states from what `project` returned for one time."""
        raise NotImplementedError

    def _initialize(self, input_shape):
        features = None if input_shape.rank is None else input_shape[-1]
        if features is None:
            raise ValueError(
                f"inputs of {self.name!r} must have a known last axis, got shape {input_shape}: "
                "set it with tf.ensure_shape"
            )
        size = self._gates * self.units
        self.weight = Weight(
            [features, size], initializer=self.kernel_initializer, **self._weight_options
        )
        self.recurrent_weight = Weight(
            [self.units, size],
            initializer=self.recurrent_initializer,
            name="recurrent_weight",
            **self._weight_options,
        )
        if self.use_bias:
            self.b = tf.Variable(self._initial_bias(), name="b")

    def _initial_bias(self):
        return initial_value(self.bias_initializer, [self._gates * self.units], self.dtype)

    def _input_bias(self):
        return tf.cast(self.b, self.compute_dtype)


class SimpleRNNCell(_Cell):
    """One step of a simple recurrent net: h' = act(x . w + h . u + b), eq. 2 for w and for u.

    Names and defaults are Keras', initializers included: data-dependent initialization is not for
    recurrent layers (paper, section 3). The variables are weight.v [in, units], weight.g [units],
    recurrent_weight.v [units, units], recurrent_weight.g [units] and b [units].

    Arguments:
      units: size of the state and the output.
      activation: a callable, a Keras name, or None.
      use_bias: whether to add b.
      kernel_initializer, recurrent_initializer: of the two v, see `tfwn.Weight`.
      bias_initializer: of b.
      name: of the cell.
      weight_options: parameterization, exponential_g, g_initializer, dtype, compute_dtype, see
        `tfwn.Weight`.

    Raises:
      ValueError: bad options; inputs without a known last axis; a wrong number of states.
      RuntimeError: reached by data-dependent initialization.

    Inputs are [batch, in]; the output and the one state are [batch, units].

    >>> cell = tfwn.SimpleRNNCell(4)
    >>> output, states = cell(tf.ones([8, 3]), cell.get_initial_state(8))
    >>> output.shape, len(states)
    (TensorShape([8, 4]), 1)
    """

    _gates = 1

    def step(self, projected, states, weights):
        """Returns h' and [h']."""
        output = self.activation(projected + tf.matmul(states[0], weights[1]))
        return output, [output]


class LSTMCell(_Cell):
    """One step of a long short-term memory, eq. 2 for the two matrices, one g per column of each.

    i, f, a, o = split(x . w + h . u + b); c' = s(f) c + s(i) act(a); h' = s(o) act(c'), where s is
    the recurrent activation. With `peepholes`, diagonal ones: p_i c joins i, p_f c joins f and
    p_o c' joins o.

    Names and defaults, gate order included, are Keras', as for `tfwn.SimpleRNNCell`. The variables
    are weight.v [in, 4 units], weight.g [4 units], recurrent_weight.v [units, 4 units],
    recurrent_weight.g [4 units], b [4 units] and peephole [3, units] (p_i, p_f, p_o), which is not
    normalized: a diagonal has one weight per unit, so that nothing but its sign would remain.

    Arguments:
      units, activation, use_bias, options: as for `tfwn.SimpleRNNCell`.
      recurrent_activation: of the gates.
      unit_forget_bias: whether b begins with 1 for the forget gate.
      peepholes: whether to add them.
      peephole_initializer: of p.

    Raises:
      ValueError, RuntimeError: as `tfwn.SimpleRNNCell`.

    Inputs are [batch, in]; the output and the two states h, c are [batch, units].

    >>> cell = tfwn.LSTMCell(4, peepholes=True)
    >>> output, (h, c) = cell(tf.ones([8, 3]), cell.get_initial_state(8))
    >>> output.shape
    TensorShape([8, 4])
    """

    _gates = 4
    _state_count = 2

    def __init__(
        self,
        units,
        activation="tanh",
        recurrent_activation="sigmoid",
        use_bias=True,
        *,
        unit_forget_bias=True,
        peepholes=False,
        peephole_initializer="zeros",
        **options,
    ):
        super().__init__(units, activation, use_bias, **options)
        self.recurrent_activation = get_activation(recurrent_activation) or tf.identity
        self.unit_forget_bias = unit_forget_bias
        self.peepholes = peepholes
        self.peephole_initializer = peephole_initializer

    def step(self, projected, states, weights):
        """Returns h' and [h', c']."""
        h, c = states
        i, f, a, o = tf.split(projected + tf.matmul(h, weights[1]), 4, axis=-1)
        if self.peepholes:
            p_i, p_f, p_o = tf.unstack(tf.cast(self.peephole, self.compute_dtype))
            i, f = i + p_i * c, f + p_f * c
        c = self.recurrent_activation(f) * c + self.recurrent_activation(i) * self.activation(a)
        if self.peepholes:
            o = o + p_o * c
        output = self.recurrent_activation(o) * self.activation(c)
        return output, [output, c]

    def _initialize(self, input_shape):
        super()._initialize(input_shape)
        if self.peepholes:
            self.peephole = tf.Variable(
                initial_value(self.peephole_initializer, [3, self.units], self.dtype),
                name="peephole",
            )

    def _initial_bias(self):
        b = super()._initial_bias()
        if not self.unit_forget_bias:
            return b
        return tf.concat([b[: self.units], tf.ones_like(b[: self.units]), b[2 * self.units :]], 0)


class GRUCell(_Cell):
    """One step of a gated recurrent unit, eq. 2 for the two matrices, one g per column of each.

    z, r = s(x . w + b + h . u + d), for their columns; a = act(x . w + b + r (h . u + d)), or
    act(x . w + b + (r h) . u) without `reset_after`; h' = z h + (1 - z) a, where s is the recurrent
    activation.

    Names and defaults, gate order included, are Keras', as for `tfwn.SimpleRNNCell`. The variables
    are weight.v [in, 3 units], weight.g [3 units], recurrent_weight.v [units, 3 units],
    recurrent_weight.g [3 units] and b [2, 3 units] (b and d), [3 units] without `reset_after`.

    Arguments:
      units, activation, use_bias, options: as for `tfwn.SimpleRNNCell`.
      recurrent_activation: of the gates.
      reset_after: whether the reset gate acts after the product with u or before it.

    Raises:
      ValueError, RuntimeError: as `tfwn.SimpleRNNCell`.

    Inputs are [batch, in]; the output and the one state are [batch, units].

    >>> cell = tfwn.GRUCell(4)
    >>> output, states = cell(tf.ones([8, 3]), cell.get_initial_state(8))
    >>> output.shape
    TensorShape([8, 4])
    """

    _gates = 3

    def __init__(
        self,
        units,
        activation="tanh",
        recurrent_activation="sigmoid",
        use_bias=True,
        *,
        reset_after=True,
        **options,
    ):
        super().__init__(units, activation, use_bias, **options)
        self.recurrent_activation = get_activation(recurrent_activation) or tf.identity
        self.reset_after = reset_after

    def step(self, projected, states, weights):
        """Returns h' and [h']."""
        (h,), (_, u) = states, weights
        x_z, x_r, x_a = tf.split(projected, 3, axis=-1)
        if self.reset_after:
            inner = tf.matmul(h, u)
            if self.use_bias:
                inner += tf.cast(tf.gather(self.b, 1), self.compute_dtype)
            h_z, h_r, h_a = tf.split(inner, 3, axis=-1)
        else:
            h_z, h_r = tf.split(tf.matmul(h, u[:, : 2 * self.units]), 2, axis=-1)
        z = self.recurrent_activation(x_z + h_z)
        r = self.recurrent_activation(x_r + h_r)
        h_a = r * h_a if self.reset_after else tf.matmul(r * h, u[:, 2 * self.units :])
        output = z * h + (1 - z) * self.activation(x_a + h_a)
        return output, [output]

    def _initial_bias(self):
        if not self.reset_after:
            return super()._initial_bias()
        return initial_value(self.bias_initializer, [2, self._gates * self.units], self.dtype)

    def _input_bias(self):
        b = tf.gather(self.b, 0) if self.reset_after else self.b
        return tf.cast(b, self.compute_dtype)


class RNN(Layer):
    """Runs a cell over time: h_t = cell(x_t, h_{t-1}); w (eq. 2) is computed once, before the loop.

    Arguments:
      cell: a `tfwn.SimpleRNNCell`, `tfwn.LSTMCell` or `tfwn.GRUCell`.
      return_sequences: whether to return the outputs of all times, or of the last only.
      return_state: whether to return the last states as well.
      go_backwards: whether to run from the last time to the first; outputs come in that order.
      unroll: whether to write the loop out, for few steps, whose number must be known.
      name: of the layer.

    Raises:
      ValueError: another kind of cell; inputs whose rank is not 3; unroll and an unknown number of
        steps; a mask of another shape; a wrong number of states.
      RuntimeError: reached by data-dependent initialization.

    Inputs are [batch, time, in]; outputs [batch, units], or [batch, time, units] with
    return_sequences, in the cell's compute_dtype.

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
        if not isinstance(cell, _Cell):
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
        """Returns the output, or with return_state the tuple of the output and the last states.

        Arguments:
          sequences: x, [batch, time, in].
          initial_state: list of [batch, units], one for each of the cell's states; default zeros.
          mask: [batch, time], False or 0 where a step is to be skipped: the states stay, and the
            output is that of the step before (0 before the first).
        """
        refuse_initialization(self)
        cell = self.cell
        x = tf.cast(sequences, cell.compute_dtype)
        if x.shape.rank != 3:
            raise ValueError(f"inputs of {self.name!r} must have rank 3, got shape {x.shape}")
        steps = tf.shape(x)[1] if x.shape[1] is None else x.shape[1]
        if self.unroll and not isinstance(steps, int):
            raise ValueError(f"unroll=True needs a known number of steps, got shape {x.shape}")
        self.build(x.shape)
        batch = tf.shape(x)[0]
        zeros = cell.get_initial_state(batch)
        states = zeros if initial_state is None else cell.check_states(initial_state)

        weights = cell.effective_weights()
        projected = self._by_time(cell.project(tf.transpose(x, [1, 0, 2]), weights), steps)
        masks = None if mask is None else self._by_time(self._time_major(mask, x.shape), steps)
        outputs: tuple[tf.TensorArray, ...] = ()
        if self.return_sequences:
            outputs = (tf.TensorArray(cell.compute_dtype, steps, element_shape=[None, cell.units]),)

        def step(time, outputs, output, *states):
            new_output, new_states = cell.step(projected.read(time), states, weights)
            if masks is not None:
                keep = masks.read(time)
                new_output = tf.where(keep, new_output, output)
                new_states = [
                    tf.where(keep, new, old) for new, old in zip(new_states, states, strict=True)
                ]
            outputs = tuple(array.write(time, new_output) for array in outputs)
            return time + 1, outputs, new_output, *new_states

        carry = (0, outputs, zeros[0], *states)
        if self.unroll:
            for _ in range(steps):
                carry = step(*carry)
        else:
            any_batch = [tf.TensorShape([None, cell.units])] * (len(states) + 1)
            carry = tf.while_loop(
                lambda time, *_: time < steps,
                step,
                carry,
                shape_invariants=(
                    tf.TensorShape([]),
                    (tf.TensorShape(None),) * len(outputs),
                    *any_batch,
                ),
                maximum_iterations=steps,
            )
        _, outputs, output, *states = carry
        if self.return_sequences:
            # The shape of a stack of no steps is not known otherwise.
            stacked = tf.reshape(outputs[0].stack(), [steps, batch, cell.units])
            output = tf.transpose(stacked, [1, 0, 2])
        output = tf.ensure_shape(output, [*x.shape[: output.shape.rank - 1], cell.units])
        return (output, *states) if self.return_state else output

    def _initialize(self, input_shape):
        self.cell.build(input_shape)

    def _by_time(self, values, steps):
        values = tf.reverse(values, [0]) if self.go_backwards else values
        return tf.TensorArray(values.dtype, steps, element_shape=values.shape[1:]).unstack(values)

    def _time_major(self, mask, shape):
        mask = tf.cast(mask, tf.bool)
        if not mask.shape.is_compatible_with(shape[:2]):
            raise ValueError(f"mask must have shape [batch, time] = {shape[:2]}, got {mask.shape}")
        return tf.transpose(mask)[:, :, tf.newaxis]


class _Sequence(RNN):
    _cell: type[_Cell]

    def __init__(
        self,
        units,
        *args,
        return_sequences=False,
        return_state=False,
        go_backwards=False,
        unroll=False,
        name=None,
        **options,
    ):
        cell = self._cell(units, *args, **options)
        super().__init__(cell, return_sequences, return_state, go_backwards, unroll, name=name)


class SimpleRNN(_Sequence):
    """Simple recurrent net over time: `tfwn.SimpleRNNCell` (eq. 2) in `tfwn.RNN`.

    Arguments:
      units and what follows: as for `tfwn.SimpleRNNCell`.
      return_sequences, return_state, go_backwards, unroll, name: as for `tfwn.RNN`.

    Raises:
      ValueError, RuntimeError: as the two.

    >>> tfwn.SimpleRNN(4)(tf.ones([8, 5, 3])).shape
    TensorShape([8, 4])
    """

    _cell = SimpleRNNCell


class LSTM(_Sequence):
    """Long short-term memory over time: `tfwn.LSTMCell` (eq. 2) in `tfwn.RNN`.

    Arguments:
      units and what follows: as for `tfwn.LSTMCell`.
      return_sequences, return_state, go_backwards, unroll, name: as for `tfwn.RNN`.

    Raises:
      ValueError, RuntimeError: as the two.

    >>> layer = tfwn.LSTM(4, return_sequences=True)
    >>> ids = tf.constant([[3, 1, 0, 0]])
    >>> layer(tf.one_hot(ids, 5), mask=ids != 0).shape
    TensorShape([1, 4, 4])
    """

    _cell = LSTMCell


class GRU(_Sequence):
    """Gated recurrent unit over time: `tfwn.GRUCell` (eq. 2) in `tfwn.RNN`.

    Arguments:
      units and what follows: as for `tfwn.GRUCell`.
      return_sequences, return_state, go_backwards, unroll, name: as for `tfwn.RNN`.

    Raises:
      ValueError, RuntimeError: as the two.

    >>> output, h = tfwn.GRU(4, return_state=True)(tf.ones([8, 5, 3]))
    >>> output.shape, h.shape
    (TensorShape([8, 4]), TensorShape([8, 4]))
    """

    _cell = GRUCell
