"""What explains a number: logit margins, input gradients, and how cross-entropy and one-vs-the-rest move margins."""
