"""The mathematics of Hessian-free optimization: pure functions over operators, no I/O.

Sources, by the numbers used in the docstrings below this package:

[1] Martens 2010, Deep learning via Hessian-free optimization (ICML).
[2] Martens & Sutskever 2012, Training deep and recurrent networks with Hessian-free optimization.
[3] Chapelle & Erhan 2011, Improved preconditioner for Hessian-free optimization.
[4] Kiros 2013, Training neural networks with stochastic Hessian-free optimization.
[8] Steihaug 1983, The conjugate gradient method and trust regions in large scale optimization.
[9] Sutskever, Martens, Dahl & Hinton 2013, On the importance of initialization and momentum.
"""
