"""The models that come with miaobi, and in a checkout how they are made: retrain.sh."""
