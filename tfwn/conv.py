"""Convolutions, transposed convolutions and the depthwise convolution."""

from __future__ import annotations

import numbers
from typing import TYPE_CHECKING

import tensorflow as tf

from tfwn.layer import FeedForward, LayerOptions, check_positive
from tfwn.weight import WeightOptions

if TYPE_CHECKING:
    from typing_extensions import Unpack


class _Conv(FeedForward):
    """Base of all convolutions: window, padding and data format."""

    _spatial_rank: int
    _paddings: tuple[str, ...] = ("valid", "same")

    def __init__(
        self,
        kernel_size,
        strides,
        padding,
        data_format,
        dilation_rate,
        activation,
        use_bias,
        **options: Unpack[LayerOptions],
    ):
        self.kernel_size = self._sizes("kernel_size", kernel_size)
        self.strides = self._sizes("strides", strides)
        self.dilation_rate = self._sizes("dilation_rate", dilation_rate)
        self.padding = padding.lower() if isinstance(padding, str) else padding
        self.data_format = data_format or "channels_last"
        for name, value, rule in (
            ("padding", self.padding, self._paddings),
            ("data_format", self.data_format, ("channels_last", "channels_first")),
        ):
            if value not in rule:
                raise ValueError(f"{name} must be one of {rule}, got {value!r}")
        super().__init__(activation, use_bias, **options)
        self._rank = self._spatial_rank + 2
        # Always passed on, because the gradient of Conv3D needs it in eager mode.
        self._format = ("NWC", "NHWC", "NDHWC")[self._spatial_rank - 1]

    def _sizes(self, name, value, least=1) -> tuple[int, ...]:
        scalar = isinstance(value, numbers.Number)
        sizes = (value,) * self._spatial_rank if scalar else tuple(value)
        if len(sizes) != self._spatial_rank or any(
            not isinstance(size, numbers.Integral) or size < least for size in sizes
        ):
            raise ValueError(
                f"{name} must be an integer or a sequence of {self._spatial_rank}, each at least "
                f"{least}, got {value!r}"
            )
        return tuple(map(int, sizes))

    def _window(self, i) -> int:
        return (self.kernel_size[i] - 1) * self.dilation_rate[i] + 1

    def _refuse_dilated_strides(self):
        if max(self.strides) > 1 and max(self.dilation_rate) > 1:
            raise ValueError(
                "strides and dilation_rate must not both exceed 1, got strides="
                f"{self.strides} and dilation_rate={self.dilation_rate}: TensorFlow does not "
                "support the combination"
            )


class _ConvND(_Conv):
    def __init__(
        self,
        filters,
        kernel_size,
        strides=1,
        padding="valid",
        data_format=None,
        dilation_rate=1,
        groups=1,
        activation=None,
        use_bias=True,
        **options: Unpack[LayerOptions],
    ):
        super().__init__(
            kernel_size,
            strides,
            padding,
            data_format,
            dilation_rate,
            activation,
            use_bias,
            **options,
        )
        self.filters = check_positive("filters", filters)
        self.groups = check_positive("groups", groups)
        self._refuse_dilated_strides()
        if self.filters % self.groups:
            raise ValueError(f"filters must be a multiple of groups={groups}, got {filters}")

    def _weight_shape(self, channels):
        if channels % self.groups:
            raise ValueError(
                f"inputs of {self.name!r} must have a number of channels that is a multiple of "
                f"groups={self.groups}, got {channels}"
            )
        return [*self.kernel_size, channels // self.groups, self.filters]

    def _linear(self, x, w):
        padding = self.padding.upper()
        if padding == "CAUSAL":
            padding = "VALID"
            x = tf.pad(x, [[0, 0], [self.dilation_rate[0] * (self.kernel_size[0] - 1), 0], [0, 0]])
        # TensorFlow infers the groups from the shapes, but not on the CPU in 3D or these dtypes.
        half = x.dtype == tf.float16 and not tf.config.list_physical_devices("GPU")
        split = self.groups if self._spatial_rank == 3 or half or x.dtype == tf.float64 else 1
        outputs = [
            tf.nn.convolution(x_i, w_i, self.strides, padding, self._format, self.dilation_rate)
            for x_i, w_i in zip(tf.split(x, split, -1), tf.split(w, split, -1), strict=True)
        ]
        return outputs[0] if split == 1 else tf.concat(outputs, -1)


class Conv1D(_ConvND):
    """1D convolution: act(x * w + b), w = g * v / ||v|| with one g per filter (eq. 2).

    Argument names and defaults are those of Keras, except that v is initialized from a normal
    distribution with standard deviation 0.05 (paper, section 3). The variables are
    weight.v [kernel, in / groups, filters], weight.g [filters] and b [filters].

    Arguments:
      filters: number of output channels.
      kernel_size, strides, dilation_rate: one integer, or one per axis. strides and dilation_rate
        must not both exceed 1.
      padding: "valid", "same" or "causal".
      data_format: "channels_last" (default) or "channels_first".
      groups: number of groups of input channels. Each group has filters / groups filters.
      activation: a callable, a Keras name, or None. `layer.pre_activation(x)` returns x * w + b.
      use_bias: whether to add b.
      options: kernel_initializer, bias_initializer, kernel_mask and name, see `tfwn.Dense`;
        parameterization, exponential_g, g_initializer, dtype, compute_dtype, see `tfwn.Weight`.

    Raises:
      ValueError: if an option is invalid, the inputs have the wrong rank, or the number of input
        channels is unknown or differs from the first call.

    Inputs have shape [batch, steps, in], or [batch, in, steps] for "channels_first". Outputs have
    shape [batch, new_steps, filters] or [batch, filters, new_steps], in compute_dtype.

    >>> tfwn.Conv1D(4, 3, padding="causal")(tf.ones([8, 10, 2])).shape
    TensorShape([8, 10, 4])
    """

    _spatial_rank = 1
    _paddings = ("valid", "same", "causal")


class Conv2D(_ConvND):
    """2D convolution: act(x * w + b), w = g * v / ||v|| with one g per filter (eq. 2).

    Same arguments and errors as `tfwn.Conv1D`; padding is "valid" or "same". The variables are
    weight.v [height, width, in / groups, filters], weight.g [filters] and b [filters].

    Inputs have shape [batch, height, width, in], or [batch, in, height, width] for
    "channels_first".

    >>> layer = tfwn.Conv2D(4, 3, strides=2, padding="same", activation="relu")
    >>> layer(tf.ones([8, 10, 12, 3])).shape
    TensorShape([8, 5, 6, 4])
    """

    _spatial_rank = 2


class Conv3D(_ConvND):
    """3D convolution: act(x * w + b), w = g * v / ||v|| with one g per filter (eq. 2).

    Same arguments and errors as `tfwn.Conv1D`; padding is "valid" or "same". The variables are
    weight.v [depth, height, width, in / groups, filters], weight.g [filters] and b [filters].

    Inputs have shape [batch, depth, height, width, in].

    >>> tfwn.Conv3D(4, (1, 3, 3))(tf.ones([2, 5, 6, 7, 3])).shape
    TensorShape([2, 5, 4, 5, 4])
    """

    _spatial_rank = 3


class _ConvNDTranspose(_Conv):
    _axis = -2

    def __init__(
        self,
        filters,
        kernel_size,
        strides=1,
        padding="valid",
        output_padding=None,
        data_format=None,
        dilation_rate=1,
        activation=None,
        use_bias=True,
        **options: Unpack[LayerOptions],
    ):
        super().__init__(
            kernel_size,
            strides,
            padding,
            data_format,
            dilation_rate,
            activation,
            use_bias,
            **options,
        )
        self.filters = check_positive("filters", filters)
        self.output_padding = None
        if output_padding is not None:
            self.output_padding = self._sizes("output_padding", output_padding, least=0)
            for i, (pad, stride) in enumerate(zip(self.output_padding, self.strides, strict=True)):
                # A convolution maps outputs of these lengths back to the input's length.
                least = 1 - self._window(i) % 2 if self.padding == "same" else 0
                if not least <= pad < least + stride:
                    raise ValueError(
                        f"output_padding must lie in [{least}, {least + stride}) along axis {i} "
                        f"for a window of {self._window(i)}, a stride of {stride} and padding "
                        f"{self.padding!r}, got {pad}"
                    )

    def _weight_shape(self, channels):
        return [*self.kernel_size, self.filters, channels]

    def _linear(self, x, w):
        sizes = tf.unstack(tf.shape(x))
        sizes = [n or sizes[i] for i, n in enumerate(x.shape)]
        output = [self._output_size(i, n) for i, n in enumerate(sizes[1:-1])]
        return tf.nn.conv_transpose(
            x,
            w,
            tf.stack([sizes[0], *output, self.filters]),
            self.strides,
            self.padding.upper(),
            self._format,
            self.dilation_rate,
        )

    def _output_size(self, i, n):
        stride, window = self.strides[i], self._window(i)
        if self.output_padding is None:
            return n * stride + (max(window - stride, 0) if self.padding == "valid" else 0)
        return (
            (n - 1) * stride
            + (window if self.padding == "valid" else window % 2)
            + self.output_padding[i]
        )


class Conv1DTranspose(_ConvNDTranspose):
    """Transposed 1D convolution: act(x *' w + b), w = g * v / ||v||, one g per filter (eq. 2).

    Argument names and defaults are those of Keras, except that v is initialized from a normal
    distribution with standard deviation 0.05 (paper, section 3). The variables are
    weight.v [kernel, filters, in], weight.g [filters] and b [filters]. The norm is over the window
    and the INPUT channels, which are the last axis.

    Arguments:
      filters, kernel_size, strides, data_format, dilation_rate, activation, use_bias, options: see
        `tfwn.Conv1D`.
      padding: "valid" or "same".
      output_padding: length of the output beyond the minimum; one integer, or one per axis. None
        follows Keras, where "same" multiplies the length by strides.

    Raises:
      ValueError: as for `tfwn.Conv1D`, or if output_padding is out of range.

    Inputs have shape [batch, steps, in], or [batch, in, steps] for "channels_first". Outputs have
    shape [batch, new_steps, filters] or [batch, filters, new_steps], in compute_dtype.

    >>> tfwn.Conv1DTranspose(4, 3, strides=2, padding="same")(tf.ones([8, 10, 2])).shape
    TensorShape([8, 20, 4])
    """

    _spatial_rank = 1


class Conv2DTranspose(_ConvNDTranspose):
    """Transposed 2D convolution: act(x *' w + b), w = g * v / ||v||, one g per filter (eq. 2).

    Same arguments and errors as `tfwn.Conv1DTranspose`. The variables are
    weight.v [height, width, filters, in], weight.g [filters] and b [filters].

    Inputs have shape [batch, height, width, in], or [batch, in, height, width] for
    "channels_first".

    >>> tfwn.Conv2DTranspose(4, 5, strides=2)(tf.ones([8, 7, 7, 3])).shape
    TensorShape([8, 17, 17, 4])
    """

    _spatial_rank = 2


class Conv3DTranspose(_ConvNDTranspose):
    """Transposed 3D convolution: act(x *' w + b), w = g * v / ||v||, one g per filter (eq. 2).

    Same arguments and errors as `tfwn.Conv1DTranspose`. The variables are
    weight.v [depth, height, width, filters, in], weight.g [filters] and b [filters].

    Inputs have shape [batch, depth, height, width, in].

    >>> tfwn.Conv3DTranspose(4, 2, strides=2)(tf.ones([2, 3, 4, 5, 3])).shape
    TensorShape([2, 6, 8, 10, 4])
    """

    _spatial_rank = 3


class DepthwiseConv2D(_Conv):
    """Depthwise 2D convolution: each channel has its own filters (eq. 2 with one g per filter).

    Output channel c * depth_multiplier + m is act(x_c * w_cm + b_cm), where w_cm = g_cm * v_cm /
    ||v_cm||. The variables are weight.v [height, width, in, depth_multiplier],
    weight.g [in, depth_multiplier] and b [in * depth_multiplier].

    Arguments:
      kernel_size, padding, data_format, dilation_rate, activation, use_bias: see `tfwn.Conv2D`.
      strides: one integer, or two that are equal.
      depth_multiplier: number of output channels per input channel.
      depthwise_initializer: initializer of v; see `tfwn.Weight`.
      bias_initializer, kernel_mask, name: see `tfwn.Dense`.
      weight_options: parameterization, exponential_g, g_initializer, dtype and compute_dtype, see
        `tfwn.Weight`.

    Raises:
      ValueError: as for `tfwn.Conv2D`, or if the strides are not equal.

    Inputs have shape [batch, height, width, in], outputs [batch, new_height, new_width,
    in * depth_multiplier], in compute_dtype.

    >>> tfwn.DepthwiseConv2D(3, depth_multiplier=2)(tf.ones([8, 10, 10, 3])).shape
    TensorShape([8, 8, 8, 6])
    """

    _spatial_rank = 2
    _axis = (-2, -1)

    def __init__(
        self,
        kernel_size,
        strides=1,
        padding="valid",
        depth_multiplier=1,
        data_format=None,
        dilation_rate=1,
        activation=None,
        use_bias=True,
        depthwise_initializer=None,
        *,
        bias_initializer="zeros",
        kernel_mask=None,
        name=None,
        **weight_options: Unpack[WeightOptions],
    ):
        super().__init__(
            kernel_size,
            strides,
            padding,
            data_format,
            dilation_rate,
            activation,
            use_bias,
            kernel_initializer=depthwise_initializer,
            bias_initializer=bias_initializer,
            kernel_mask=kernel_mask,
            name=name,
            **weight_options,
        )
        self.depth_multiplier = check_positive("depth_multiplier", depth_multiplier)
        self._refuse_dilated_strides()
        if len(set(self.strides)) > 1:
            raise ValueError(f"strides must be the same along both axes, got {self.strides}")

    def _weight_shape(self, channels):
        return [*self.kernel_size, channels, self.depth_multiplier]

    def _linear(self, x, w):
        return tf.nn.depthwise_conv2d(
            x, w, [1, *self.strides, 1], self.padding.upper(), dilations=self.dilation_rate
        )
