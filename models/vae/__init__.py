"""Convolutional variational auto-encoders (paper section 5.2, figure 3).

    python -m models.vae --dataset mnist --parameterization weight_norm --data-dir DATA
    python -m models.vae evaluate runs/vae-mnist-paper-weight_norm-0 --eval-samples 100
    python -m models.vae sample runs/vae-mnist-paper-weight_norm-0

The bound on the test images with averaged weights, read off the axes of figure 3:

    MNIST       -88 to -84 nats, from epoch 50 to 300
    CIFAR-10    8000 to 10000 in 450 epochs: log-density in nats of pixels in [0, 1], that is
                3072 ln 2 (8 - b) for b bits/dim; 8000 is b = 4.24, 9500 is 3.54, 10000 is 3.30

The paper gives the shape of MNIST's encoder and the optimizer. Its "auto-regressive variational
inference" is inverse autoregressive flow (Kingma et al. 2016, arXiv 1606.04934: IAF), whose code
for CIFAR-10 is public ("the code"). Where we deviate, or where the paper is silent:

 1. MNIST: 32 latents and two flow steps, each a MADE with hidden layers of 320 and 320 (IAF).
    Pixels are binarized once, from a fixed seed: --binarization. A block ends in an ELU; the
    code's blocks end in a ReLU.
 2. CIFAR-10: the paper does not give the depth. We use 8 stochastic layers, half of them at 16x16
    and half at 8x8: --stochastic-layers. As in the code, the likelihood ignores the mass that the
    logistic has beyond the 256 values: --open-ends.
 3. The logistic has one scale per color, initialized from the first images. The code has a single
    scale, initialized to 1.
 4. Data-dependent initialization (section 3) uses 200 images and gives pre-activations a standard
    deviation of 1, or 0.1 in layers that output parameters of a distribution. On CIFAR-10 it is
    0.1, and 1 in the flows, as in the code. A unit that does not vary keeps its g; the code then
    skips the whole layer. Both parameterizations start as the same function: w = g v / ||v||.
 5. g is a parameter itself (section 2); the code learns log(g) / 3.
 6. Batches have 100 images; the code's have 16.
 7. Convolutions pad with zeros; the code also adds an input channel that is 1 in the padding.
 8. A hidden unit of a flow sees every unit of the layer before whose degree is not above its own;
    in the code the i-th unit sees the first i.
 9. A transposed convolution of stride 2 is a convolution to four times the channels, followed by
    depth-to-space.
10. Adamax is the code's: no bias correction, epsilon inside the maximum.
11. The code's normal parameterization is w = g v with Glorot's v and a constant g, which the
    data-dependent initialization sets: --frozen-g. By default w itself is trained.
12. The decay of the averaged parameters in step t is min(1 - 1 / (10 epochs), (1 + t) / (10 + t)),
    so that the average is useful in short runs too.
"""
