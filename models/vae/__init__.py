"""Convolutional variational auto-encoders (paper section 5.2, figure 3).

    python -m models.vae --dataset mnist --parameterization weight_norm --data-dir DATA
    python -m models.vae evaluate runs/vae-mnist-paper-weight_norm-0 --eval-samples 100
    python -m models.vae sample runs/vae-mnist-paper-weight_norm-0

Bound on the test images with averaged weights, read off the axes of figure 3:

    MNIST       -88 to -84 nats between epochs 50 and 300
    CIFAR-10    8000 to 10000 over 450 epochs: log-density in nats of pixels in [0, 1], i.e.
                3072 ln 2 (8 - b) for b bits/dim; 8000 is b = 4.24, 9500 is 3.54, 10000 is 3.30

The paper specifies the optimizer and the shape of the MNIST encoder. Its "auto-regressive
variational inference" is inverse autoregressive flow (IAF; Kingma et al. 2016, arXiv 1606.04934),
whose CIFAR-10 code is public ("the code"). Deviations, and choices where the paper is silent:

 1. MNIST: 32 latents and two flow steps, each a MADE with two hidden layers of 320 units, as in
    IAF's paper. Pixels are binarized once, from a fixed seed (--binarization). Blocks end in an
    ELU; in the code, they end in a ReLU.
 2. CIFAR-10: the paper does not give the depth. We use 8 stochastic layers, half at 16x16 and half
    at 8x8 (--stochastic-layers). As in the code, the likelihood ignores the logistic's mass
    outside the range of the 256 values (--open-ends includes it).
 3. The logistic has one scale per color, initialized from the first images. The code has a single
    scale, initialized to 1.
 4. Data-dependent initialization (section 3) uses 200 images and gives pre-activations a standard
    deviation of 1, or 0.1 in layers that output the parameters of a distribution. On CIFAR-10 it
    is 1 in the flows and 0.1 elsewhere, as in the code. A unit with a constant output keeps its g;
    the code then skips the whole layer. Both parameterizations start with the same w = g v / ||v||.
 5. g itself is trained (section 2); the code trains log(g) / 3.
 6. The batch size is 100; the code uses 16.
 7. Convolutions pad with zeros; the code also adds an input channel that is 1 in the padding.
 8. In a flow, a hidden unit sees all units of the previous layer whose degree is at most its own;
    in the code, the i-th unit sees the first i units.
 9. Upsampling is a convolution to four times the channels followed by depth-to-space, not a
    transposed convolution of stride 2.
10. Adamax follows the code: no bias correction, and epsilon inside the maximum.
11. In the code, the normal parameterization is w = g v with Glorot's v and a constant g set by the
    data-dependent initialization (--frozen-g). By default, w itself is trained.
12. At step t, the decay of the parameter average is min(1 - 1 / n, (1 + t) / (10 + t)), where n is
    the number of steps in 10 epochs. This makes the average useful in short runs too.
"""
