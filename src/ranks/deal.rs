//! Which rank takes which part of the work.

use std::cmp::Reverse;

/// Deals pieces of work of these costs to ranks, the costliest first, each to the rank with the least work so far; of equal
/// ones the first. Returns each rank's pieces, indices of `costs` in rising order. It depends on the arguments alone.
///
/// ```
/// let dealt = gneiss::ranks::deal(&[1, 5, 2, 2], 2);
/// assert_eq!(dealt, [vec![1], vec![0, 2, 3]]);
/// ```
pub fn deal(costs: &[usize], ranks: usize) -> Vec<Vec<usize>> {
    let mut order: Vec<usize> = (0..costs.len()).collect();
    order.sort_by_key(|piece| Reverse(costs[*piece]));
    let mut dealt = vec![Vec::new(); ranks.max(1)];
    let mut loads = vec![0; dealt.len()];
    for piece in order {
        let least = (0..loads.len()).min_by_key(|rank| loads[*rank]).unwrap_or(0);
        loads[least] += costs[piece];
        dealt[least].push(piece);
    }
    dealt.iter_mut().for_each(|pieces| pieces.sort_unstable());
    dealt
}

#[cfg(test)]
mod tests {
    use super::deal;

    #[test]
    fn deal_gives_each_piece_to_one_rank() {
        for (pieces, ranks) in [(0, 3), (1, 3), (2, 3), (3, 3), (17, 5), (4, 1)] {
            let costs: Vec<usize> = (0..pieces).map(|i| 3 + i * 7 % 11).collect();
            let dealt = deal(&costs, ranks);
            assert_eq!(dealt.len(), ranks);
            let mut all: Vec<usize> = dealt.concat();
            all.sort_unstable();
            assert_eq!(all, (0..pieces).collect::<Vec<_>>());
            // Rank 0 has work if there is any.
            assert_eq!(dealt[0].is_empty(), pieces == 0);
            assert!(dealt.iter().all(|pieces| pieces.is_sorted()));
        }
    }

    #[test]
    fn deal_balances_by_the_costliest_piece() {
        let costs: Vec<usize> = (0..40).map(|i| 20 + i * 13 % 57).collect();
        for ranks in [2, 3, 7] {
            let loads: Vec<usize> =
                deal(&costs, ranks).iter().map(|pieces| pieces.iter().map(|i| costs[*i]).sum()).collect();
            let (least, most) = (loads.iter().min().unwrap(), loads.iter().max().unwrap());
            // The last piece that the fullest rank got went there when it had the least.
            assert!(most - least <= *costs.iter().max().unwrap(), "{loads:?}");
        }
        assert_eq!(deal(&[0, 0, 0], 2), [vec![0, 1, 2], vec![]]);
        assert_eq!(deal(&[2, 2, 2], 2), [vec![0, 2], vec![1]]);
    }
}
