"""Deep Q-network on Atari games (paper section 5.4, figures 5 and 6).

    python -m models.dqn --game Breakout --parameterization weight_norm
    python -m models.dqn evaluate runs/dqn-Breakout-paper-weight_norm-0
    python -m models.dqn watch runs/dqn-Breakout-paper-weight_norm-0

Network and algorithm are those of Mnih et al. 2015 ("Nature") with the paper's changes: Adamax
with momentum 0.5, minibatches of 64, and every layer weight-normalized and initialized from data.
Maximum test score over 200 epochs (figure 6):

    game             normal   weight norm   Mnih et al.
    Breakout            410           403           401
    Enduro            1,250         1,448           302
    Seaquest          7,188         7,375         5,286
    Space Invaders    1,779         2,179         1,975

Deviations from the paper, and choices where it is silent:

 1. `--num-envs 1` (the default) acts and learns in Nature's order. `--num-envs 8` is faster: 8
    games run in parallel with the learner, so actions are chosen with weights up to two updates
    old. Either way, all schedules count actions.
 2. The paper adapts the code "deep_q_rl", which differs from Nature in details. `--variant
    deep_q_rl` plays and learns like that code (see Config) except for its initial weights (He's,
    uniform; biases 0.1), its random first 4 actions in a test, and the new game that it starts at
    each epoch.
 3. The target network is copied every 10,000 actions, as in Nature's code. Nature's table says
    10,000 parameter updates, and that is what deep_q_rl and `--variant deep_q_rl` count: 40,000
    actions or more. The paper does not mention it.
 4. The batch for data-dependent initialization is drawn from the replay memory after the warm-up.
    The paper specifies neither its source nor whether the output layer is initialized too
    (`--init-output none` leaves that layer out). In the paper's code, the normal parameterization
    is w = g v with Glorot's v and a constant g set by this initialization (`--frozen-g`).
 5. With several games, a test plays them in parallel and drops those unfinished at the end; the
    paper's code drops only one.
 6. Frames are scaled bilinearly, as in deep_q_rl. `--preset nature` averages areas, as Nature's
    code does, but differs from it in two details: in that code, a lost life in training cuts the
    action short, and play resumes after 1 to 30 no-ops with a new frame stack; and the first
    convolution pads its input by 1.
"""
