//! Packing: combining samples of different lengths into packs of a fixed capacity.

use std::collections::BTreeSet;

/// Divides items of different lengths into packs of at most `capacity`, by best-fit decreasing. Returns the indices of
/// the items in each pack.
///
/// The longest item comes first, and each item goes into the fullest pack that has room for it. This is the strategy
/// `bfd` of TRL, except that no item is truncated: an item longer than `capacity` is a pack of its own. The result
/// depends only on the lengths. The time is `O(n log n)`.
///
/// ```
/// let packs = pricket_train::best_fit(&[300, 700, 200, 900], 1000);
/// assert_eq!(packs, [vec![3], vec![1, 0], vec![2]]);
/// ```
pub fn best_fit(lens: &[usize], capacity: usize) -> Vec<Vec<usize>> {
    let mut order: Vec<usize> = (0..lens.len()).collect();
    order.sort_by_key(|&i| (std::cmp::Reverse(lens[i]), i));
    let mut packs: Vec<Vec<usize>> = Vec::new();
    // Free room and number of each pack that is not full.
    let mut open: BTreeSet<(usize, usize)> = BTreeSet::new();
    for i in order {
        let (free, pack) = if let Some(&found) = open.range((lens[i], 0)..).next() {
            open.remove(&found);
            found
        } else {
            packs.push(Vec::new());
            (capacity, packs.len() - 1)
        };
        packs[pack].push(i);
        if let Some(left) = free.checked_sub(lens[i]).filter(|left| *left > 0) {
            open.insert((left, pack));
        }
    }
    packs
}

/// Divides items into groups of at most `capacity`, in order. An item that is larger is a group of its own.
pub(crate) fn in_order(lens: &[usize], capacity: usize) -> Vec<Vec<usize>> {
    let mut groups: Vec<Vec<usize>> = Vec::new();
    let mut free = 0;
    for (i, &len) in lens.iter().enumerate() {
        if let Some(group) = groups.last_mut().filter(|_| len <= free) {
            free -= len;
            group.push(i);
        } else {
            free = capacity.saturating_sub(len);
            groups.push(vec![i]);
        }
    }
    groups
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::best_fit;

    proptest! {
        #[test]
        fn every_item_is_packed_once_and_no_pack_overflows(
            lens in prop::collection::vec(1usize..120, 0..60), capacity in 1usize..100,
        ) {
            let packs = best_fit(&lens, capacity);
            let mut all: Vec<usize> = packs.concat();
            all.sort_unstable();
            prop_assert_eq!(all, (0..lens.len()).collect::<Vec<_>>());
            for pack in &packs {
                let sum: usize = pack.iter().map(|&i| lens[i]).sum();
                prop_assert!(sum <= capacity || pack.len() == 1);
            }
            // No two packs could be one, so at least half of the room is used.
            let mut sums: Vec<usize> = packs.iter().map(|pack| pack.iter().map(|&i| lens[i]).sum()).collect();
            sums.sort_unstable();
            if let [first, second, ..] = sums[..] {
                prop_assert!(first + second > capacity);
            }
        }
    }
}
