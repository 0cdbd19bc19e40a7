"""The ways to prune: one module a method. `endor.pruning.contract.METHODS` names them."""
