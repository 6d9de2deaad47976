"""Operations with derivatives of their own: one file an operation, first and second derivatives.

Plans compose these with ordinary torch operations. Each is linear in each of its tensor arguments,
so its derivatives are operations of the same kind, and derivatives of any order follow.
"""
