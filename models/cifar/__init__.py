"""CIFAR-10 classification (paper, section 5.1; figures 1 and 2; architecture in table A).

    python -m models.cifar --parameterization weight_norm_mean_only_bn --data-dir DATA
    python -m models.cifar evaluate runs/cifar-paper-weight_norm_mean_only_bn-0

Test error after 200 epochs, the paper's figure 2:

    mean-only batch norm                  8.52 %
    weight norm                           8.46 %
    normal                                8.43 %
    batch norm                            8.05 %
    weight norm + mean-only batch norm    7.31 %

What the paper leaves open, or where its released code differs from it:

 1. The code scales the inputs to (u8 - 127.5) / 128. Its ZCA adds 1e-5 to the eigenvalues and
    takes the moments of the training images only. This program does the same.
 2. The code's Adam has its epsilon inside the root: --epsilon-inside-root. The default is Keras'
    Adam, which has it outside. Both correct the bias with the beta_1 of the moment.
 3. The code's normal parameterization initializes w by Glorot's rule and keeps a constant g, which
    the data-dependent initialization sets: --frozen-g. By default all five parameterizations
    start as the same function, w = g v / ||v|| of the same v after the same initialization.
 4. The data-dependent initialization sees the first 500 images of the first epoch, with noise and
    dropout, as in the code.
"""
