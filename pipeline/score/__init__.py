"""How good samples are: pictures to features, features to figures."""
