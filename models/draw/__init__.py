"""DRAW, a recurrent generative model of MNIST (paper section 5.3, figure 4).

    python -m models.draw --parameterization weight_norm --data-dir DATA
    python -m models.draw sample runs/draw-paper-weight_norm-0

Bounds on the test log-likelihood in nats, for comparison (the paper only has figure 4):

    Theano implementation, normal, 100 epochs, reported by its author    -90.5
    DRAW's paper (arXiv 1502.04623, table 2), with attention             -80.97

The paper starts from that Theano implementation of DRAW ("the code"). Choices that the paper leaves
open, and where the code differs from DRAW's paper:

 1. The paper mentions neither the number of glimpses nor attention. The default follows the code's
    attention example: windows of 2x2 and 5x5, 64 glimpses. The code's own default reads whole
    images in 10 glimpses (--preset no-attention).
 2. As in the code, MNIST is binarized. Here that is done once, from a seed: each pixel is 1 with a
    probability equal to its gray value. Training uses the first 50,000 images of the file, in the
    file's order, without shuffling.
 3. "Weight normalization to all weight vectors": every column of every matrix has its own g. The
    LSTM has separate matrices for input and state. Peepholes are not normalized.
 4. v is initialized to the w of the normal parameterization and g to ||v||, so both
    parameterizations start as the same function.
 5. There is no --frozen-g. Without data-dependent initialization, a constant g would stay 1, so
    the normal parameterization of the paper's code does not differ from the one here.
 6. All LSTM biases, including the forget gate's, and all initial states are 0, as in the code.
"""
