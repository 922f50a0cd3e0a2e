"""Why weight normalization is robust to the learning rate (paper, section 2.1).

    python -m models.mechanism --sweep --jobs 2 --data-dir DATA

Trains a small network on MNIST by plain SGD at several learning rates, in both parameterizations
from the same initial function, and measures what section 2.1 says:

 1. An update dv is orthogonal to v, so ||v + dv|| = sqrt(1 + c^2) ||v|| with c = ||dv|| / ||v||.
 2. The higher the learning rate, the faster ||v|| grows, until an update turns w by a moderate
    angle: "an appropriate effective learning rate".
 3. w is often close to the dominant eigenvector of C, the covariance of the gradient with respect
    to w. The projection M C M, M = I - w w' / ||w||^2, removes it and is closer to the identity.

The paper has no figure for these. Network, batch size and number of steps are ours.
"""
