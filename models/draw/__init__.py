"""DRAW, a recurrent generative model of MNIST (paper, section 5.3; figure 4).

    python -m models.draw --parameterization weight_norm --data-dir DATA
    python -m models.draw sample runs/draw-paper-weight_norm-0

Bounds on the test set's log-likelihood in nats, for comparison (figure 4 has no table):

    this model in Theano, normal, 100 epochs, reported by its author       -90.5
    DRAW's own paper (arXiv 1502.04623, table 2), with attention          -80.97

What the paper leaves open, or where the code that it starts from differs from DRAW's paper:

 1. The paper names neither glimpses nor attention. The default is the code's example with
    attention: windows of 2x2 and 5x5, 64 glimpses. The code's own default reads whole images in 10
    glimpses: --preset no-attention.
 2. The data are the code's binarized MNIST, here drawn once from a seed: each pixel is 1 with the
    probability of its gray value. The first 50,000 images of the file are for training, in the
    file's order, without shuffling.
 3. "Weight normalization to all weight vectors": every column of every matrix has its g; the
    LSTM's input and state have a matrix each. Peepholes are not normalized.
 4. v is initialized to the w of the normal parameterization and g to ||v||, so that both start as
    the same function.
 5. There is no --frozen-g: without data-dependent initialization a constant g is 1, and the
    paper's code's normal parameterization is the normal one.
 6. The LSTM's biases, the forget gate's included, and all states are initialized to 0, as in the
    code.
"""
