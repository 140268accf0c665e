"""Steps of several processes together."""
