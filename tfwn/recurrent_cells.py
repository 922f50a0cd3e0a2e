"""Recurrent cells: one time step of SimpleRNN, LSTM and GRU."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import tensorflow as tf

from tfwn.activations import get_activation
from tfwn.initializers import initial_value
from tfwn.layer import Layer, check_positive, refuse_initialization
from tfwn.weight import Weight, WeightOptions, check_weight_options

if TYPE_CHECKING:
    from typing_extensions import Unpack


class RecurrentOptions(WeightOptions, total=False):
    """Keyword arguments common to all recurrent layers; see `tfwn.SimpleRNNCell`."""

    kernel_initializer: Any
    recurrent_initializer: Any
    bias_initializer: Any


class CellOptions(RecurrentOptions, total=False):
    """Keyword arguments common to all cells; see `tfwn.SimpleRNNCell`."""

    name: str | None


class Cell(Layer):
    """Base of the cells: an input kernel, a recurrent kernel and one time step.

    A time step has two parts. `project` computes x . w + b, which needs no state and therefore runs
    for all time steps at once. `step` computes the rest. Both take the effective weights, which are
    computed once per call, outside the loop.
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
        **weight_options: Unpack[WeightOptions],
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
        """Returns the output [batch, units] and the list of new states after one time step.

        Arguments:
          inputs: x [batch, in], cast to the cell's compute_dtype.
          states: list of [batch, units], from `get_initial_state` or the previous step.
          weights: the effective weights, if the caller has already computed them, as in a loop.
            Default: `self.effective_weights()`.
        """
        refuse_initialization(self)
        x = tf.cast(inputs, self.compute_dtype)
        self.build(x.shape)
        states = self.check_states(states)
        weights = self.effective_weights() if weights is None else weights
        return self.step(self.project(x, weights), states, weights)

    def effective_weights(self) -> list[tf.Tensor]:
        """Returns w of the input kernel and w of the recurrent kernel."""
        return [self.weight(), self.recurrent_weight()]

    def get_initial_state(self, batch_size) -> list[tf.Tensor]:
        """Returns a list of zeros [batch_size, units], one for each state."""
        return [tf.zeros([batch_size, self.units], self.compute_dtype)] * self._state_count

    def check_states(self, states) -> list[tf.Tensor]:
        """Returns the states as a list in compute_dtype; raises ValueError for a wrong number."""
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
        """Returns the output and the new states; `projected` is the result of `project`."""
        raise NotImplementedError

    def _initialize(self, input_shape):
        features = None if input_shape.rank is None else input_shape[-1]
        if features is None:
            raise ValueError(
                f"inputs of {self.name!r} must have a last axis of known size, got shape "
                f"{input_shape}: set it with tf.ensure_shape"
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


class SimpleRNNCell(Cell):
    """One step of a simple recurrent network: h' = act(x . w + h . u + b), with eq. 2 for w and u.

    Argument names and defaults, including the initializers, are those of Keras, because
    data-dependent initialization is not for recurrent layers (paper, section 3). The variables are
    weight.v [in, units], weight.g [units], recurrent_weight.v [units, units],
    recurrent_weight.g [units] and b [units].

    Arguments:
      units: size of the state and of the output.
      activation: a callable, a Keras name, or None.
      use_bias: whether to add b.
      kernel_initializer, recurrent_initializer: initializers of the two v; see `tfwn.Weight`.
      bias_initializer: initializer of b.
      name: name of the cell.
      weight_options: parameterization, exponential_g, g_initializer, dtype and compute_dtype, see
        `tfwn.Weight`.

    Raises:
      ValueError: if an option is invalid, the size of the inputs' last axis is unknown, or the
        number of states is wrong.
      RuntimeError: if data-dependent initialization reaches the cell.

    Inputs have shape [batch, in]. The output and the only state have shape [batch, units], in
    compute_dtype.

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


class LSTMCell(Cell):
    """One step of a long short-term memory, with eq. 2 for both matrices and one g per column.

    i, f, a, o = split(x . w + h . u + b); c' = s(f) c + s(i) act(a); h' = s(o) act(c'), where s is
    the recurrent activation. `peepholes` add the diagonal terms p_i c to i, p_f c to f and p_o c'
    to o.

    Argument names, defaults and the order of the gates are those of Keras. The variables are
    weight.v [in, 4 units], weight.g [4 units], recurrent_weight.v [units, 4 units],
    recurrent_weight.g [4 units], b [4 units] and peephole [3, units] (p_i, p_f, p_o). The peepholes
    are not normalized, because normalizing a single weight per unit would leave only its sign.

    Arguments:
      units, activation, use_bias, options: see `tfwn.SimpleRNNCell`.
      recurrent_activation: activation of the gates.
      unit_forget_bias: whether to initialize the forget gate's b to 1.
      peepholes: whether the gates depend on c.
      peephole_initializer: initializer of p.

    Raises:
      ValueError, RuntimeError: as for `tfwn.SimpleRNNCell`.

    Inputs have shape [batch, in]. The output and the two states, h and c, have shape
    [batch, units], in compute_dtype.

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
        **options: Unpack[CellOptions],
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


class GRUCell(Cell):
    """One step of a gated recurrent unit, with eq. 2 for both matrices and one g per column.

    z, r = s(x . w + b + h . u + d); a = act(x . w + b + r (h . u + d)), or without `reset_after`
    act(x . w + b + (r h) . u); h' = z h + (1 - z) a. s is the recurrent activation, and z, r and a
    each have their own columns of w, u, b and d.

    Argument names, defaults and the order of the gates are those of Keras. The variables are
    weight.v [in, 3 units], weight.g [3 units], recurrent_weight.v [units, 3 units],
    recurrent_weight.g [3 units] and b [2, 3 units] (b and d) or, without `reset_after`, [3 units].

    Arguments:
      units, activation, use_bias, options: see `tfwn.SimpleRNNCell`.
      recurrent_activation: activation of the gates.
      reset_after: whether to apply the reset gate after the product with u instead of before it.

    Raises:
      ValueError, RuntimeError: as for `tfwn.SimpleRNNCell`.

    Inputs have shape [batch, in]. The output and the only state have shape [batch, units], in
    compute_dtype.

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
        **options: Unpack[CellOptions],
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
