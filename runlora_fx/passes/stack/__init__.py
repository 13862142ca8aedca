"""Stacks: products that read the same tensor become one product.

In: a joint graph whose plans are written. Out: the same graph, in which matrices lie side by side
in one buffer, and one product reads what several read before:

    x Mq', x Mk', x Mv', x A'      ->      x [Mq; Mk; Mv; A]', cut into its columns
    zq' x, zk' x                   ->      [zq | zk]' x, cut into its rows
    dq Mq + dk Mk + dv Mv          ->      [dq | dk | dv] [Mq; Mk; Mv]

Inductor writes what a product or a pointwise kernel makes straight into its place in the buffer.
Whatever else is in it is copied, and every copy is priced.

Invariant: a stack is made only if it is predicted to take less time, and only if the new product,
read block by block, is the old ones. Only ``planning`` imports this room.
"""
