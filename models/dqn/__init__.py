"""Deep Q-network on Atari games (paper section 5.4, figures 5 and 6).

    python -m models.dqn --game Breakout --parameterization weight_norm
    python -m models.dqn evaluate runs/dqn-Breakout-paper-weight_norm-0
    python -m models.dqn watch runs/dqn-Breakout-paper-weight_norm-0

Network and algorithm are those of Mnih et al. 2015 ("Nature"), with the paper's changes: Adamax
with momentum 0.5, minibatches of 64, and every layer weight-normalized and initialized from data.
Maximum test score over 200 epochs, figure 6:

    game             normal   weight norm   Mnih et al.
    Breakout            410           403           401
    Enduro            1,250         1,448           302
    Seaquest          7,188         7,375         5,286
    Space Invaders    1,779         2,179         1,975

Where we deviate from the paper, or where it is silent:

 1. `--num-envs 8` (fast) chooses actions for 8 games with weights up to two updates old, and the
    games play while the learner learns. `--num-envs 1` (the default) keeps Nature's order. Either
    way, every schedule counts actions.
 2. The paper adapts the code "deep_q_rl", which differs from Nature in details; `--variant
    deep_q_rl` plays and learns as that code does (see Config), with these exceptions: its initial
    weights (He's, uniform; biases 0.1), the first 4 actions of a test, which are random there, and
    the new game that it starts at each epoch.
 3. The batch for data-dependent initialization is drawn from the replay memory after the warm-up.
    The paper says neither where it comes from nor whether the output layer is initialized too
    (`--init-output none` leaves that layer out). The paper's code's normal parameterization is
    w = g v with Glorot's v and a constant g, which this initialization sets: `--frozen-g`.
 4. With several games, a test plays them side by side and drops the games that are unfinished at
    the end; the paper's code has one such game.
 5. Frames are scaled bilinearly, as in deep_q_rl. Nature's code averages areas, and so does
    `--preset nature`, which differs from that code in two details: there, a lost life in training
    breaks the action off, and the game goes on with 1 to 30 no-ops and a new stack; and the first
    convolution pads its input by 1.
"""
