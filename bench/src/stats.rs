//! Order statistics of a handful of samples.

/// Samples in order.
#[derive(Debug)]
pub(crate) struct Sorted(Vec<f64>);

impl Sorted {
    /// Sorts them.
    pub(crate) fn new(samples: &[f64]) -> Self {
        let mut sorted = samples.to_vec();
        sorted.sort_by(f64::total_cmp);
        Self(sorted)
    }

    /// The smallest sample that at least this share (0 to 1) of them does not exceed; 0 without samples.
    #[expect(
        clippy::cast_precision_loss,
        clippy::cast_possible_truncation,
        clippy::cast_sign_loss,
        reason = "there are few samples, and the share is between 0 and 1"
    )]
    pub(crate) fn quantile(&self, share: f64) -> f64 {
        let rank = (share * self.0.len() as f64).ceil() as usize;
        self.0.get(rank.saturating_sub(1)).copied().unwrap_or_default()
    }

    /// The middle one.
    pub(crate) fn median(&self) -> f64 {
        self.quantile(0.5)
    }

    /// Half the distance between the first and the third quartile.
    pub(crate) fn spread(&self) -> f64 {
        (self.quantile(0.75) - self.quantile(0.25)) / 2.0
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    #[expect(clippy::float_cmp, reason = "samples are taken as they are")]
    fn quantiles_are_samples() {
        let sorted = Sorted::new(&[5.0, 1.0, 4.0, 2.0, 3.0]);
        assert_eq!((sorted.median(), sorted.quantile(0.99), sorted.quantile(0.0)), (3.0, 5.0, 1.0));
        assert_eq!(sorted.spread(), 1.0);
        assert_eq!(Sorted::new(&[7.0]).quantile(0.99), 7.0);
        assert_eq!(Sorted::new(&[]).median(), 0.0);
    }
}
