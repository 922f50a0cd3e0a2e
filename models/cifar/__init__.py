"""CIFAR-10 classification (paper section 5.1, figures 1 and 2; architecture in table A).

    python -m models.cifar --parameterization weight_norm_mean_only_bn --data-dir DATA
    python -m models.cifar evaluate runs/cifar-paper-weight_norm_mean_only_bn-0

Test error after 200 epochs (figure 2):

    mean-only batch norm                  8.52 %
    weight norm                           8.46 %
    normal                                8.43 %
    batch norm                            8.05 %
    weight norm + mean-only batch norm    7.31 %

Choices that the paper leaves open, and where its released code ("the code") differs from it:

 1. As in the code, inputs are scaled to (u8 - 127.5) / 128, and ZCA adds 1e-5 to the eigenvalues
    of the covariance of the training images alone.
 2. The code's Adam adds epsilon inside the square root (--epsilon-inside-root). The default is
    Keras' Adam, which adds it outside. Both correct the bias with the current beta_1.
 3. In the code, the normal parameterization is w = g v with Glorot initialization of v and a
    constant g, which the data-dependent initialization sets (--frozen-g). By default, w itself is
    trained, and all five parameterizations start as one function, from the same v.
 4. The data-dependent initialization uses the first 500 images of the first epoch, with noise and
    dropout, as in the code.
"""
