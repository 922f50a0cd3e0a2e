"""Tests of section 2.1: is weight normalization robust to the learning rate, and why?

    python -m models.mechanism --sweep --jobs 2 --data-dir DATA

Trains a small network on MNIST with plain SGD at several learning rates, in both
parameterizations, which start as the same function, and measures what section 2.1 claims:

 1. An update dv is orthogonal to v, so ||v + dv|| = sqrt(1 + c^2) ||v|| with c = ||dv|| / ||v||.
 2. The higher the learning rate, the faster ||v|| grows, until an update turns w by a moderate
    angle: "an appropriate effective learning rate".
 3. w is often close to the dominant eigenvector of C, the covariance of the gradient with respect
    to w. The projection M = I - w w' / ||w||^2 removes it, so M C M is closer to the identity.

Equal learning rates are not equal steps. A step in v moves w by (g / ||v||)^2 times what the same
rate moves w in the normal parameterization, and v ~ N(0, 0.05) starts shorter than g. In the arm
`weight_norm_matched`, v starts with length g, so that its first step is the normal one.

The paper has no figure for these claims. Network, batch size and number of steps are our choice.
"""
